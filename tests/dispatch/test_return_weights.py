"""combine(..., return_weights=True): topk_weights summed over all rows of each token, together with the rows."""

import pytest
import torch
import worlds
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm
from moecomm import reference

EXPERTS, TOP_K, HIDDEN = 8, 3, 64


def summed(outs, numbers, counts, layout):
    """Sum numbers of all rows per token, in the order of the sources; return the sums by rank."""
    width = (TOP_K,) if layout == "rank" else ()
    sums = [torch.zeros((t, *width)) for t in counts]
    for out, values in zip(outs, numbers, strict=True):
        for row, (rank, token) in enumerate(
            zip(out.source_rank.tolist(), out.source_token.tolist(), strict=True)
        ):
            if rank >= 0:
                sums[rank][token] += values[row]
    return sums


@pytest.mark.parametrize("size,per_node", [(1, 1), (4, 2)])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_sums(either_world, size, per_node, layout):  # noqa: F811
    """Against the oracle, for fresh weights and for ones, with all other options."""
    counts = [(7, 0, 12, 3)[r] for r in range(size)]
    xs, ids, weights = worlds.random_world(size, counts, HIDDEN, EXPERTS, TOP_K, torch.float32, seed=size)
    outs = reference.dispatch(xs, ids, weights, num_experts=EXPERTS, layout=layout)
    g = torch.Generator().manual_seed(3)
    numbers = [torch.randn(out.topk_weights.shape, generator=g) for out in outs]
    biases = [torch.randn((2, t, HIDDEN), generator=g) for t in counts]
    expert = layout == "expert"
    want = reference.combine(
        [out.x for out in outs],
        outs,
        counts,
        ranks_per_node=per_node,
        topk_weights=numbers if expert else None,
        bias=[b[0] + b[1] for b in biases],
    )
    sums = summed(outs, numbers, counts, layout)
    rows = summed(outs, [torch.ones_like(n) for n in numbers], counts, layout)

    def main(comm):
        r = comm.rank
        here = lambda t: t.to(comm.device)  # noqa: E731
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=torch.float32
        )
        out = buf.dispatch(here(xs[r]), here(ids[r]), here(weights[r]), layout=layout)
        bias = tuple(here(b) for b in biases[r])
        y, got = buf.combine(
            out.x.clone(), out.handle, topk_weights=here(numbers[r]), bias=bias, return_weights=True
        )
        worlds.assert_same(y.cpu(), want[r], f"rank {r}: y")
        assert got.shape == sums[r].shape and torch.allclose(got.cpu(), sums[r], atol=1e-5)
        target = torch.full_like(y, torch.nan)
        ones = torch.ones_like(here(numbers[r]))
        pending = buf.combine(
            out.x.clone(),
            out.handle,
            topk_weights=ones,
            wire="fp8",
            out=target,
            async_op=True,
            return_weights=True,
        )
        y, got = pending.wait()
        assert y is target and not y.isnan().any()
        assert torch.equal(got.cpu(), rows[r]), "ones give the number of rows per token"
        again = buf.combine(out.x.clone(), out.handle)  # then a combine without weights
        assert torch.equal(again, buf.combine(out.x.clone(), out.handle))
        return int(got.sum())

    counted = moecomm.run_local(main, size, ranks_per_node=per_node)
    assert size == 1 or sum(counted) > 0


def test_refused():
    """Invalid combinations, and ranks that differ, are refused on all ranks, which stay in step."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=8, dtype=torch.float32
        )
        xs, ids, weights = worlds.random_world(2, 5, HIDDEN, EXPERTS, TOP_K, torch.float32)
        r = comm.rank
        out = buf.dispatch(xs[r], ids[r], weights[r], layout="rank")
        n, rows = out.handle.num_rows, out.x.clone()
        for message, how in (
            ("topk_weights is None", {}),
            (rf"float32 \[{n}, {TOP_K}\]", {"topk_weights": torch.ones(n)}),
            ("bias is a tuple of 3", {"topk_weights": out.topk_weights, "bias": (xs[r],) * 3}),
            (
                "bias is non-contiguous torch.float32",
                {"topk_weights": out.topk_weights, "bias": (xs[r], xs[r][:, :8])},
            ),
        ):
            with pytest.raises(moecomm.InvalidArgument, match=message):
                buf.combine(rows, out.handle, return_weights=True, **how)
        with pytest.raises(moecomm.InvalidArgument, match="but a gradient is required"):
            buf.combine(rows.requires_grad_(), out.handle, topk_weights=out.topk_weights, return_weights=True)
        rows = rows.detach()
        with pytest.raises(moecomm.ConfigMismatch, match="the same return_weights"):
            if r == 0:
                buf.combine(rows, out.handle)
            else:
                buf.combine(rows, out.handle, topk_weights=out.topk_weights, return_weights=True)
        with pytest.raises(moecomm.ConfigMismatch, match="the same return_weights"):
            if r == 0:
                torch.ops.moecomm.combine_slots(
                    rows, out.topk_weights, out.handle.tensor(), buf.name, "rank", out.handle.num_tokens
                )
            else:
                buf.combine(rows, out.handle, topk_weights=out.topk_weights, return_weights=True)
        _, got = buf.combine(rows, out.handle, topk_weights=out.topk_weights, return_weights=True)
        assert torch.allclose(got, weights[r].where(ids[r] >= 0, 0.0))

    moecomm.run_local(main, 2, timeout=30)
