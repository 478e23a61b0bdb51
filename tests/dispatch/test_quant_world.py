"""FP8 rows in dispatch and coded rows in combine, on rank threads, against the oracle, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import assert_received, assert_same, random_world

import moecomm
from moecomm import quant, reference
from moecomm import reference_quant as oracle

GEOMETRIES = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 1)]  # nodes x ranks per node
PER_RANK, TOP_K = 3, 4


def quantized(x, scheme):
    """Return (codes, scales) of the oracle, with scales packed as in a message."""
    codes, scales = oracle.quantize(x, scale="ue8m0" if scheme == "fp8_ue8m0" else "f32")
    return codes, quant.pack_ue8m0(scales) if scheme == "fp8_ue8m0" else scales


def make_world(size, hidden=208, dtype=torch.bfloat16, seed=0, tokens=None):
    return random_world(
        size,
        tokens or [(5 * r + 3) % 12 for r in range(size)],
        hidden,
        PER_RANK * size,
        min(TOP_K, PER_RANK * size),
        dtype,
        seed,
    )


def make_buffer(comm, world, **arguments):
    xs, ids, _ = world
    return moecomm.Buffer(
        comm,
        hidden=xs[0].shape[1],
        num_experts=PER_RANK * comm.size,
        top_k=ids[0].shape[1],
        dtype=xs[0].dtype,
        max_tokens=max(1, *(len(x) for x in xs)),
        **arguments,
    )


def check_dispatch(
    world,
    size,
    per_node,
    scheme,
    scale_layout="row",
    layout="expert",
    capacity=None,
    alignment=1,
    channels=None,
):
    """Fused quantization gives the oracle's result for rows quantized before the call."""
    xs, ids, weights = world
    coded = [quantized(x, scheme) for x in xs]
    want = reference.dispatch(
        [c for c, _ in coded],
        ids,
        weights,
        num_experts=PER_RANK * size,
        layout=layout,
        expert_alignment=alignment,
        capacity=capacity,
        scales=[s for _, s in coded],
    )

    def main(comm):
        r = comm.rank
        buf = make_buffer(comm, world, channels=channels)
        stats, out = [], None
        for again in range(2):
            how = {"topk_weights": weights[r], "quant": scheme, "scale_layout": scale_layout}
            if again:
                out = buf.dispatch(xs[r], handle=out.handle, **how)
            else:
                out = buf.dispatch(
                    xs[r], ids[r], layout=layout, capacity=capacity, expert_alignment=alignment, **how
                )
            assert_received(out, want[r], r)
            if scale_layout == "column" and len(out.x):
                assert (
                    out.scales.stride(0) == 1
                    and out.scales.stride(1) == -(-len(out.x) // 4) * 4
                    and out.scales.data_ptr() % 16 == 0
                )
            stats.append(buf.stats())
        # Rows quantized before the call arrive equal.
        out = buf.dispatch(
            coded[r],
            ids[r],
            weights[r],
            scale_layout=scale_layout,
            layout=layout,
            capacity=capacity,
            expert_alignment=alignment,
        )
        assert_received(out, want[r], r)
        stats.append(buf.stats())
        comm.barrier()
        return stats

    for r, (first, again, prepared) in enumerate(moecomm.run_local(main, size, ranks_per_node=per_node)):
        assert first["quantized_rows"] == again["quantized_rows"] == int((ids[r] >= 0).any(1).sum()), (
            "every row is quantized once"
        )
        assert prepared["quantized_rows"] == 0
        for hop in ("rail", "node"):
            assert first[hop] == again[hop] == prepared[hop]


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("scheme", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_dispatch_quantizes(nodes, per_node, scheme, scale_layout, layout):
    size = nodes * per_node
    check_dispatch(make_world(size, seed=size), size, per_node, scheme, scale_layout, layout)


@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_capacity_and_alignment(scale_layout, layout):
    check_dispatch(
        make_world(4, seed=7),
        4,
        2,
        "fp8",
        scale_layout,
        layout,
        capacity=101,
        alignment=8 if layout == "expert" else 1,
        channels=3,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [16, 128, 1040])
def test_dtypes_and_widths(dtype, hidden):
    check_dispatch(make_world(4, hidden, dtype, seed=hidden), 4, 2, "fp8_ue8m0", "column")


def test_fp8_halves_the_bytes():
    """Exact bytes of dispatch on both hops: per 128 elements, 128 + 4 bytes instead of 256."""
    world = make_world(4, 7168, seed=3, tokens=8)
    xs, ids, weights = world

    def main(comm):
        buf = make_buffer(comm, world)
        sizes = {}
        for scheme in (None, "fp8", "fp8_ue8m0"):
            buf.dispatch(xs[comm.rank], ids[comm.rank], weights[comm.rank], quant=scheme)
            stats = buf.stats()
            sizes[scheme] = [
                stats[hop][kind] / max(1, stats[hop][kind.replace("bytes", "rows")])
                for hop in ("rail", "node")
                for kind in ("logical_bytes", "physical_bytes")
            ]
        comm.barrier()
        return sizes

    for sizes in moecomm.run_local(main, 4, ranks_per_node=2):
        assert sizes == {
            None: [14336] * 4,
            "fp8": [7168 + 224] * 4,
            "fp8_ue8m0": [7168 + 64, 7168 + 64, 7168 + 56, 7168 + 56],
        }


def test_checked_rows(monkeypatch):
    """MOECOMM_CHECK=1: the checksum covers the FP8 row, on whichever rank it was made."""
    monkeypatch.setenv("MOECOMM_CHECK", "1")
    check_dispatch(make_world(6, seed=11), 6, 2, "fp8")


def check_combine(world, size, per_node, wires, layout="expert", bias=None, channels=None):
    """Every rank gets its rows in its own wire format, independently of the others."""
    xs, ids, weights = world
    hidden, dtype = xs[0].shape[1], xs[0].dtype
    want = reference.dispatch(xs, ids, weights, num_experts=PER_RANK * size, layout=layout)
    g = torch.Generator().manual_seed(17)
    rows = [
        (
            torch.randn(w.x.shape, generator=g)
            * torch.exp2(
                6 * torch.randn(w.x.shape, generator=g) if dtype != torch.float16 else torch.zeros(())
            )
        ).to(dtype)
        for w in want
    ]
    row_weights = [w.topk_weights for w in want] if layout == "expert" else None
    expected = reference.combine(
        rows,
        want,
        [len(x) for x in xs],
        ranks_per_node=per_node,
        topk_weights=row_weights,
        bias=None if bias is None else [bias] * size,
        wire=[oracle.wire(w) for w in wires],
    )

    def main(comm):
        r = comm.rank
        buf = make_buffer(comm, world, channels=channels)
        out = buf.dispatch(xs[r], ids[r], weights[r], layout=layout)
        buf.stats()
        y = torch.full(xs[r].shape, float("nan"), dtype=dtype)
        for _ in range(2):
            y.fill_(float("nan"))
            buf.combine(
                rows[r],
                out.handle,
                topk_weights=row_weights and out.topk_weights,
                bias=bias,
                wire=wires[r],
                out=y,
            )
            assert_same(y, expected[r], f"rank {r}: y over {wires[r]}")
        stats = buf.stats()
        comm.barrier()
        return stats["rail"]

    sizes = {
        None: hidden * dtype.itemsize,
        "fp8": quant.wire_bytes(hidden, "fp8"),
        "logfmt10": quant.wire_bytes(hidden, "logfmt10"),
    }
    counted = sum(rail["physical_bytes"] for rail in moecomm.run_local(main, size, ranks_per_node=per_node))
    crossings = [
        sum(
            len({e // PER_RANK // per_node for e in row if e >= 0} - {r // per_node})
            for row in ids[r].tolist()
        )
        for r in range(size)
    ]
    assert counted == 2 * sum(n * sizes[w] for n, w in zip(crossings, wires, strict=True)), (
        "bytes over the rail"
    )


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("wire", ["fp8", "logfmt10"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_combine_over_a_wire(nodes, per_node, wire, layout):
    size = nodes * per_node
    check_combine(make_world(size, seed=size), size, per_node, [wire] * size, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [16, 128, 1040])
def test_wires_of_every_dtype_and_width(dtype, hidden):
    bias = torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    check_combine(
        make_world(6, hidden, dtype, seed=hidden),
        6,
        2,
        ["fp8", "logfmt10", None, "fp8", None, "logfmt10"],
        bias=bias,
        channels=3,
    )


def test_one_node_ignores_the_wire():
    world = make_world(3, seed=2)
    xs, ids, weights = world

    def main(comm):
        buf = make_buffer(comm, world)
        out = buf.dispatch(xs[comm.rank], ids[comm.rank], weights[comm.rank])
        plain, coded = (buf.combine(out.x, out.handle, wire=wire) for wire in (None, "fp8"))
        assert_same(coded, plain, "y")
        comm.barrier()

    moecomm.run_local(main, 3)


def test_wires_under_checks_and_gradients(monkeypatch):
    """MOECOMM_CHECK=1 covers the coded row; gradients ignore the wire format."""
    monkeypatch.setenv("MOECOMM_CHECK", "1")
    check_combine(make_world(4, seed=9), 4, 2, ["logfmt10", "fp8", "logfmt10", None])
    world = make_world(4, seed=9)
    xs, ids, _ = world

    def main(comm):
        grads = []
        for wire in (None, "fp8"):
            buf = make_buffer(comm, world)
            out = buf.dispatch(xs[comm.rank], ids[comm.rank])
            rows = out.x.clone().requires_grad_()
            (buf.combine(rows, out.handle, wire=wire) * xs[comm.rank]).sum().backward()
            grads.append(rows.grad)
        assert_same(grads[1], grads[0], "gradient")
        comm.barrier()

    moecomm.run_local(main, 4, ranks_per_node=2)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(GEOMETRIES),
    st.integers(1, 20),
    st.sampled_from(["fp8", "fp8_ue8m0"]),
    st.sampled_from(["row", "column"]),
    st.sampled_from(["expert", "rank"]),
    st.integers(0, 2**31),
    st.data(),
)
def test_any_world(geometry, sixteenths, scheme, scale_layout, layout, seed, data):
    nodes, per_node = geometry
    size = nodes * per_node
    tokens = [data.draw(st.integers(0, 9)) for _ in range(size)]
    world = make_world(size, 16 * sixteenths, seed=seed, tokens=tokens)
    check_dispatch(world, size, per_node, scheme, scale_layout, layout)
    check_combine(
        world,
        size,
        per_node,
        [data.draw(st.sampled_from([None, "fp8", "logfmt10"])) for _ in range(size)],
        layout,
    )


def test_ranks_that_disagree():
    world = make_world(4, 128, seed=1)
    xs, ids, _ = world

    def main(comm):
        buf = make_buffer(comm, world)
        with pytest.raises(moecomm.ConfigMismatch):
            buf.dispatch(xs[comm.rank], ids[comm.rank], quant="fp8" if comm.rank == 2 else "fp8_ue8m0")
        with pytest.raises(moecomm.ConfigMismatch):
            buf.dispatch(
                xs[comm.rank], ids[comm.rank], quant="fp8", scale_layout="column" if comm.rank == 1 else "row"
            )
        assert_same(
            buf.dispatch(xs[comm.rank], ids[comm.rank]).x,
            reference.dispatch(xs, ids, num_experts=12)[comm.rank].x,
            "afterwards",
        )
        comm.barrier()

    moecomm.run_local(main, 4, ranks_per_node=2)


def test_bad_arguments():
    world = make_world(1)
    xs, ids, _ = world

    def main(comm):
        buf = make_buffer(comm, world)
        codes, scales = quant.quantize(xs[0])
        for x, options in [
            (xs[0], {"quant": "fp4"}),
            (xs[0], {"scale_layout": "diagonal", "quant": "fp8"}),
            (xs[0], {"scale_layout": "column"}),
            ((codes, scales), {"quant": "fp8"}),
            ((codes, scales[:, :1].contiguous()), {}),
            ((codes, scales.double()), {}),
            (xs[0].float().requires_grad_(), {"quant": "fp8"}),
        ]:
            with pytest.raises(moecomm.InvalidArgument, match="expected"):
                buf.dispatch(x, ids[0], **options)
        out = buf.dispatch(xs[0], ids[0])
        buf.stats()
        with pytest.raises(moecomm.InvalidArgument, match="expected one of"):
            buf.combine(out.handle.rows, out.handle, wire="bf16")
        wide = moecomm.Buffer(comm, hidden=16, num_experts=4, top_k=1, max_tokens=4, dtype=torch.float64)
        out = wide.dispatch(torch.ones((1, 16), dtype=torch.float64), torch.zeros((1, 1), dtype=torch.int64))
        with pytest.raises(moecomm.InvalidArgument, match="expected None"):
            wide.combine(out.handle.rows, out.handle, wire="fp8")
        with pytest.raises(moecomm.InvalidArgument, match="expected None"):
            wide.dispatch(
                torch.ones((1, 16), dtype=torch.float64), torch.zeros((1, 1), dtype=torch.int64), quant="fp8"
            )
        assert buf.stats()["calls"] == 0

    moecomm.run_local(main, 1)
