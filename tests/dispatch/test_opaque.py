"""Opaque rows: any dtype, any number of side tensors, received bit for bit as sent."""

import pytest
import torch
import worlds
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

EXPERTS, TOP_K, HIDDEN = 8, 3, 256
E5M2, E4M3, E8M0 = torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu


def randomly(tokens, columns, dtype, g):
    """Return random bits of a dtype; one-dimensional if columns is 0."""
    size = max(columns, 1) * dtype.itemsize
    raw = torch.randint(0, 256, (tokens, size), generator=g, dtype=torch.uint8)
    if dtype == torch.bool:
        return raw.bool()
    value = raw.view(dtype)
    return value if columns else value[:, 0]


FORMATS = {
    "MXFP8": (E4M3, HIDDEN, [(E8M0, HIDDEN // 32)]),
    "NVFP4": (torch.uint8, HIDDEN // 2, [(E4M3, HIDDEN // 16), (torch.float32, 0)]),
    "int8 per token": (torch.int8, HIDDEN, [(torch.float32, 0)]),
    "e5m2 per 128": (E5M2, HIDDEN, [(torch.float32, HIDDEN // 128)]),
    "many sides": (
        torch.int32,
        16,
        [(torch.int64, 0), (torch.bool, 3), (torch.float64, 1), (torch.int16, 5)],
    ),
    "no side": (torch.int64, 8, []),
}


@pytest.mark.parametrize("size,per_node", [(1, 1), (4, 2)])
def test_formats(either_world, size, per_node):  # noqa: F811
    """Rows and side tensors arrive like plain rows with the same picks; one plan serves both; combine works."""
    counts = [(6, 0, 9, 2)[r] for r in range(size)]
    xs, ids, weights = worlds.random_world(size, counts, HIDDEN, EXPERTS, TOP_K, torch.bfloat16, seed=4)
    g = torch.Generator().manual_seed(1)
    made = {
        name: [[randomly(t, columns, dtype, g), *(randomly(t, n, d, g) for d, n in sides)] for t in counts]
        for name, (dtype, columns, sides) in FORMATS.items()
    }

    def main(comm):
        r = comm.rank
        here = lambda t: t.to(comm.device)  # noqa: E731
        shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16)
        buf = moecomm.Buffer(
            comm, **shape, arena_bytes=moecomm.Buffer.arena_hint(comm, **shape, dispatches=8)
        )
        for i, (name, parts) in enumerate(made.items()):
            how = [{}, {"layout": "rank"}, {"expert_alignment": 4}, {"capacity": 60}][i % 4]
            plain = buf.dispatch(here(xs[r]), here(ids[r]), here(weights[r]), **how)
            source = plain.source_rank.tolist(), plain.source_token.tolist()
            payload = moecomm.Opaque(*map(here, parts[r]))
            fresh = buf.dispatch(payload, here(ids[r]), here(weights[r]), **how)
            again = buf.dispatch(payload, handle=plain.handle)
            for out in (fresh, again):
                assert out.scales is None and len(out.sides) == len(parts[r]) - 1
                for got, sent in zip((out.x, *out.sides), zip(*parts, strict=True), strict=True):
                    assert got.dtype == sent[0].dtype and got.shape[1:] == sent[0].shape[1:], name
                    for row, (rank, token) in enumerate(zip(*source, strict=True)):
                        want = sent[rank][token] if rank >= 0 else torch.zeros_like(got[row].cpu())
                        worlds.assert_same(
                            got[row].cpu().reshape(1, -1), want.reshape(1, -1), f"{name}: row {row}"
                        )
                assert torch.equal(out.source_token, plain.source_token)
            assert torch.equal(fresh.topk_weights, plain.topk_weights) and plain.sides == ()
            y = buf.combine(plain.x.clone(), fresh.handle)
            assert torch.equal(y, buf.combine(plain.x.clone(), plain.handle))

    moecomm.run_local(main, size, ranks_per_node=per_node)


def test_refused():
    """Invalid payloads are refused, also if ranks differ in dtype but not in bytes."""
    rows = torch.zeros(3, 64, dtype=torch.uint8)
    for message, parts in (
        ("rows is torch.uint8.*multiple of 16 bytes", (torch.zeros(3, 20, dtype=torch.uint8),)),
        (r"sides\[0\] is torch.float32 \[2\]", (rows, torch.zeros(2))),
        (r"sides\[1\] is torch.float32 \[3, 1, 1\]", (rows, torch.zeros(3), torch.zeros(3, 1, 1))),
        ("rows: got str|rows is a str", ("rows",)),
    ):
        with pytest.raises(moecomm.InvalidArgument, match=message):
            moecomm.Opaque(*parts)

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=32, num_experts=4, top_k=1, max_tokens=3)
        ids, small = torch.arange(3).view(3, 1), rows[:, :32].contiguous()
        for message, payload, how in (
            ("x has 80 bytes per token; expected at most 64", moecomm.Opaque(rows, torch.zeros(3)), {}),
            ("quant is 'fp8'", moecomm.Opaque(rows), {"quant": "fp8"}),
            (
                "x is opaque, but a gradient is required",
                moecomm.Opaque(small, torch.zeros(3, requires_grad=True)),
                {},
            ),
            ("4 tokens; expected at most", moecomm.Opaque(torch.zeros(4, 16, dtype=torch.uint8)), {}),
        ):
            with pytest.raises(moecomm.InvalidArgument, match=message):
                buf.dispatch(payload, ids, **how)
        dtype = (torch.int8, torch.uint8)[comm.rank]
        with pytest.raises(moecomm.ConfigMismatch, match="dtype"):
            buf.dispatch(moecomm.Opaque(torch.zeros(3, 16, dtype=dtype)), ids)
        out = buf.dispatch(moecomm.Opaque(rows), ids)
        assert out.x.dtype == torch.uint8

    moecomm.run_local(main, 2, ranks_per_node=1, timeout=20)
