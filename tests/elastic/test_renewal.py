"""A Buffer takes the parts of the next generation's: what stays its own, in a world of one rank."""

import torch

import moecomm
from moecomm.elastic.renewed import Renewal, buffers_of


def test_hooks_name_and_trace_stay():
    """Hooks run after the change too, operators find the new parts by the old name, and roles are still noted."""
    seen = []

    def main(comm):
        shape = {"hidden": 16, "num_experts": 2, "top_k": 1, "max_tokens": 4}
        buf = moecomm.Buffer(comm, **shape)
        before, name = buf.backend, buf.name
        buf.register_hook("post_dispatch", lambda out: seen.append(out.x.shape[0]))
        buf.backend.memory.trace(True)
        renewal = Renewal(buf)
        fresh = renewal.make(comm, renewal.plan([0], 1))
        assert list(buffers_of(comm)) == [0], "the next one is not a Buffer of its own"
        renewal.become(fresh)
        assert buf.backend is fresh.backend is not before and buf.name == name
        x = torch.ones((3, 16), dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros((3, 1), dtype=torch.int64)
        out = buf.dispatch(x, ids)
        buf.combine(out.x, out.handle).sum().backward()
        with torch.no_grad():
            buf.dispatch(x, ids)
        return x.grad.sum().item(), len(buf.backend.memory.native.take_timeline())

    ((grad, roles),) = moecomm.run_local(main, 1)
    assert seen == [3, 3] and grad == 3 * 16 and roles > 0
