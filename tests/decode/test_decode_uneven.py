"""Ranks that combine one handle unequal numbers of times: a typed error on every rank, never rows of another call."""

import time

import pytest
import torch
from decode_steps import make_buffer
from emulated_gpu import either_world  # noqa: F401 - a fixture
from worlds import random_world

import moecomm
from moecomm import reference

SIZE, TIMEOUT, STEPS = 2, 3.0, 3


@pytest.mark.parametrize("per_node", [2, 1])
@pytest.mark.parametrize("combines", [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_unequal_numbers_of_combines(either_world, combines, per_node):  # noqa: F811
    """Ranks go on with equal steps. Whatever a call returns before its rank gets an error, is right."""
    worlds = [random_world(SIZE, 8, 64, 8, 4, seed=s, masked=0) for s in range(1 + STEPS)]

    def main(comm):
        buf, r = make_buffer(comm, worlds[0], decode=True), comm.rank

        def step(world, number):
            xs, ids, weights = world
            mine = [part[r].to(comm.device) for part in world]
            want = reference.decode_dispatch(xs, ids, num_experts=8, max_tokens=buf.decode_max_tokens)
            recv, _ = buf.decode_dispatch(mine[0], mine[1], quant=None, return_hook=False)
            comm.synchronize()
            for e, n in enumerate(want[r].counts.tolist()):
                assert torch.equal(recv.x[e, :n].cpu(), want[r].x[e, :n]), "dispatch: rows of another call"
            for i in range(number):
                scaled = [w * (i + 1) for w in weights]
                expected = reference.decode_combine(
                    [w.x for w in want], ids, scaled, num_experts=8, ranks_per_node=comm.ranks_per_node
                )
                y, _ = buf.decode_combine(
                    want[r].x.to(comm.device), mine[1], mine[2] * (i + 1), recv.handle, return_hook=False
                )
                comm.synchronize()
                assert torch.equal(y.cpu(), expected[r]), f"combine {i}: rows of another call"

        began = time.monotonic()
        try:
            step(worlds[0], combines[r])
            for world in worlds[1:]:
                began = time.monotonic()
                step(world, 1)
        except moecomm.MoecommError as error:
            return type(error).__name__, time.monotonic() - began
        return None

    seen = moecomm.run_local(main, SIZE, ranks_per_node=per_node, timeout=TIMEOUT)
    assert None not in seen, seen
    for kind, seconds in seen:
        assert kind in ("PeerTimeout", "InvalidArgument", "ConfigMismatch", "PeerLost"), seen
        assert seconds < 3 * TIMEOUT + 10, seen
