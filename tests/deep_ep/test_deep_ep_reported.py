"""An argument that the drop-in refuses on one rank is an error on every rank in that very call.

The next call is right.
"""

import pytest
import torch
from deep_ep_oracle import layout_and_dispatch

import moecomm
from moecomm.integrations import deep_ep

EXPERTS, K, HIDDEN, SIZE = 8, 2, 128, 4


class Normal:
    """deep_ep.Buffer: rows that return as they are, one per rank."""

    def __init__(self, comm):
        self.buffer = deep_ep.Buffer(comm, 1 << 20, 0, low_latency_mode=True, num_qps_per_rank=1)

    def dispatch(self, x, ids, weights, handle=None):
        if handle is None:
            out = layout_and_dispatch(self.buffer, x, ids, weights, EXPERTS)
        else:
            out = self.buffer.dispatch(x, handle=handle)
        return out[0], out[4]

    def combine(self, rows, handle, ids, weights):
        return self.buffer.combine(rows, handle)[0]


class LowLatency(Normal):
    """Its low-latency verbs."""

    def dispatch(self, x, ids, weights, handle=None):
        rows, _, handle, _, _ = self.buffer.low_latency_dispatch(x, ids, 8, EXPERTS, use_fp8=False)
        return rows, handle

    def combine(self, rows, handle, ids, weights):
        return self.buffer.low_latency_combine(rows, ids, weights, handle)[0]


class Elastic(Normal):
    """deep_ep.ElasticBuffer."""

    sync = True

    def __init__(self, comm):
        self.buffer = deep_ep.ElasticBuffer(comm, num_max_tokens_per_rank=8, hidden=HIDDEN, num_topk=K)

    def dispatch(self, x, ids, weights, handle=None):
        given = (
            dict(handle=handle) if handle else dict(topk_idx=ids, num_experts=EXPERTS, do_cpu_sync=self.sync)
        )
        out = self.buffer.dispatch(x, **given)
        return out[0], out[3]


class ElasticStatic(Elastic):
    """The same where the host does not wait."""

    sync = False


class Hybrid(Normal):
    """deep_ep.HybridEPBuffer in token order."""

    def __init__(self, comm):
        self.buffer = deep_ep.HybridEPBuffer(comm, HIDDEN, 8, EXPERTS // SIZE)

    def dispatch(self, x, ids, weights, handle=None):
        given = (
            dict(handle=handle)
            if handle
            else dict(topk_idx=ids, topk_weights=weights, num_of_experts=EXPERTS)
        )
        out = self.buffer.dispatch(x, **given)
        return out[0], out[3]

    def combine(self, rows, handle, ids, weights):
        return self.buffer.combine(rows, handle=handle)[0]


class Permuted(Hybrid):
    """The same in expert order."""

    def dispatch(self, x, ids, weights, handle=None):
        given = dict(handle=handle) if handle else dict(topk_idx=ids, topk_weights=weights)
        out = self.buffer.dispatch_with_permute(hidden=x, **given)
        return out[0], out[-1]

    def combine(self, rows, handle, ids, weights):
        return self.buffer.combine_with_unpermute(hidden=rows, handle=handle)[0]


def cases():
    """(interface, verb that one rank is wrong in, how)."""
    for kind in (Normal, LowLatency, Elastic, ElasticStatic, Hybrid, Permuted):
        for verb, hows in (("dispatch", ("shape",)), ("again", ("tokens",)), ("combine", ("rows", "handle"))):
            if verb != "again" or kind is not LowLatency:
                for how in hows:
                    yield pytest.param(kind, verb, how, id=f"{kind.__name__}-{verb}-{how}")


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind,verb,how", cases())
def test_all_ranks_raise_in_that_call(kind, verb, how, nodes):
    """Far below the deadline; afterwards the same buffers serve the next round."""
    seed = torch.seed()

    def rank_main(comm):
        g = torch.Generator().manual_seed(seed % (1 << 31) + comm.rank)
        x = torch.randn((5, HIDDEN), generator=g).bfloat16()
        ids = torch.rand((5, EXPERTS), generator=g).argsort(1)[:, :K].contiguous()
        # A decode_combine waits for the ranks that its tokens have picked: each token picks an expert of rank 1.
        ids[:, 0], ids[:, 1] = 2, torch.where(ids[:, 1] == 2, 5, ids[:, 1])
        weights = torch.ones((5, K))
        side, wrong = kind(comm), comm.rank == 1

        def round_of(fault=None):
            bad = wrong and fault is not None
            rows, handle = side.dispatch(x[0] if bad and fault == "dispatch" else x, ids, weights)
            if fault == "again":
                side.dispatch(x[:3] if bad else x, ids, weights, handle)
            if fault == "combine" and bad:
                rows, handle = (rows[..., :-3, :], handle) if how == "rows" else (rows, 3)
            return rows, side.combine(rows, handle, ids, weights)

        _, first = round_of()
        with pytest.raises(moecomm.InvalidArgument) as raised:
            round_of(verb)
        assert wrong or "rank 1" in str(raised.value)
        _, second = round_of()
        assert torch.equal(first, second) and first.abs().sum() > 0
        comm.barrier()

    moecomm.run_local(rank_main, SIZE, ranks_per_node=SIZE // nodes, timeout=30)
