"""The cuda world's decode path, quantization and streams, on a real GPU or tests/support/emulated_gpu.py."""

import pytest
import torch
from emulated_gpu import gpu, real_gpu  # noqa: F401 - a fixture
from worlds import assert_same, random_world

import moecomm
from bench.device import captured
from moecomm import quant, reference, reference_quant

HIDDEN, EXPERTS_PER_RANK, TOP_K, MAX_TOKENS = 512, 4, 4, 16


def make_buffer(comm, dtype=torch.bfloat16):
    """Make a buffer with the decode path for these worlds."""
    return moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=EXPERTS_PER_RANK * comm.size,
        top_k=TOP_K,
        max_tokens=MAX_TOKENS,
        dtype=dtype,
        num_sms=2,
        decode=True,
    )


def make_world(size, seed, tokens=MAX_TOKENS):
    """Make random inputs on the host; ranks have different numbers of tokens, and one has none."""
    return random_world(
        size,
        [0 if r == 1 else tokens - 2 * r for r in range(size)],
        HIDDEN,
        EXPERTS_PER_RANK * size,
        TOP_K,
        seed=seed,
    )


def coded(x, scheme):
    """Return (codes, scales) of the oracle, with scales packed as in a message."""
    codes, scales = reference_quant.quantize(x, scale="ue8m0" if scheme == "fp8_ue8m0" else "f32")
    return codes, quant.pack_ue8m0(scales) if scheme == "fp8_ue8m0" else scales


def oracle_of(world, scheme, *, ranks_per_node, weights_travel=False, wire=None):
    """Return (received data of every rank, output rows of the experts, sums)."""
    xs, ids, weights = world
    experts = EXPERTS_PER_RANK * len(xs)
    rows = [coded(x, scheme) for x in xs] if scheme else [(x, None) for x in xs]
    want = reference.decode_dispatch(
        [x for x, _ in rows],
        ids,
        num_experts=experts,
        max_tokens=MAX_TOKENS,
        scales=[s for _, s in rows] if scheme else None,
    )
    outputs = [(w.x.to(torch.float32) * (rank + 1) / 4).to(torch.bfloat16) for rank, w in enumerate(want)]
    sums = reference.decode_combine(
        outputs,
        ids,
        weights,
        num_experts=experts,
        weights_travel=weights_travel,
        ranks_per_node=ranks_per_node,
        wire=reference_quant.wire(wire),
    )
    return want, outputs, sums


def expect_received(recv, want, what):
    """Compare all received rows, their scales and the counts with the oracle."""
    assert_same(recv.counts.cpu(), want.counts, f"{what}: counts")
    for e, n in enumerate(want.counts.tolist()):
        assert_same(recv.x[e, :n].cpu(), want.x[e, :n], f"{what}: x of expert {e}")
        if want.scales is not None:
            assert_same(recv.scales[e, :n].cpu(), want.scales[e, :n], f"{what}: scales of expert {e}")


@pytest.mark.parametrize("nodes,per_node", [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("scheme", [None, "fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("wire", [None, "fp8", "logfmt10"])
def test_decode_steps(gpu, nodes, per_node, scheme, weights_travel, wire):  # noqa: F811
    """Epochs of both parities, late hooks, rows in place and staged, outputs filled with garbage."""
    size = nodes * per_node
    worlds = [make_world(size, seed=10 * size + n) for n in range(5)]
    expected = [
        oracle_of(w, scheme, ranks_per_node=per_node, weights_travel=weights_travel, wire=wire)
        for w in worlds
    ]

    def rank_main(comm):
        buf, r = make_buffer(comm), comm.rank
        for n, (world, (want, outputs, sums)) in enumerate(zip(worlds, expected, strict=True)):
            x, ids, weights = (t[r].to(comm.device) for t in world)
            recv, hook = buf.decode_dispatch(
                x, ids, topk_weights=weights if weights_travel else None, quant=scheme, return_hook=n % 2 == 0
            )
            if hook:
                hook()
            expect_received(recv, want[r], f"rank {r}, step {n}")
            rows = outputs[r].to(comm.device)
            if n % 3 != 2:
                rows = recv.handle.rows.copy_(rows)
            y = torch.full(x.shape, float("nan"), dtype=x.dtype, device=comm.device)
            _, hook = buf.decode_combine(
                rows,
                ids,
                None if weights_travel else weights,
                recv.handle,
                wire=wire,
                return_hook=n % 2 == 1,
                out=y,
            )
            if hook:
                hook()
            assert_same(y.cpu(), sums[r], f"rank {r}, step {n}: y")
        comm.barrier()
        buf.close()

    moecomm.run_local(rank_main, size, ranks_per_node=per_node, device="cuda:0")


@pytest.mark.parametrize("nodes,per_node", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("weights_travel", [False, True])
def test_combines_with_one_handle(gpu, nodes, per_node, weights_travel):  # noqa: F811
    """Each with other rows, from a tensor of the caller; counts as int32."""
    size = nodes * per_node
    world = make_world(size, seed=3)
    want, outputs, _ = oracle_of(world, None, ranks_per_node=per_node)
    _, ids, weights = world

    def rank_main(comm):
        buf, r = make_buffer(comm), comm.rank
        for _ in range(3):
            x, mine, weight = (t[r].to(comm.device) for t in world)
            recv, hook = buf.decode_dispatch(
                x, mine, topk_weights=weight if weights_travel else None, quant=None
            )
            hook()
            counts = recv.counts_as(torch.int32)
            assert counts.dtype is torch.int32 and torch.equal(counts.cpu().long(), want[r].counts)
            for n in range(3):
                rows = [o * (n + 1) for o in outputs]
                sums = reference.decode_combine(
                    rows,
                    ids,
                    weights,
                    num_experts=buf.num_experts,
                    weights_travel=weights_travel,
                    ranks_per_node=per_node,
                )
                y, hook = buf.decode_combine(
                    rows[r].to(comm.device),
                    mine,
                    None if weights_travel else weight,
                    recv.handle,
                    return_hook=n != 1,
                )
                if hook:
                    hook()
                assert_same(y.cpu(), sums[r], f"rank {r}, combine {n}: y")
        comm.barrier()
        buf.close()

    moecomm.run_local(rank_main, size, ranks_per_node=per_node, device="cuda:0")


@real_gpu
@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1)])
def test_three_captured_steps_replayed_101_times(nodes, per_node):
    """An odd number of epochs per replay and over all replays: the epochs are counted on the device.

    Inputs change in place between replays.
    """
    size, steps = nodes * per_node, 3
    worlds = [make_world(size, seed=n) for n in range(steps)]

    def rank_main(comm):
        buf, r = make_buffer(comm), comm.rank
        inputs = [[t[r].to(comm.device) for t in world] for world in worlds]
        received = [
            [
                torch.zeros(
                    (EXPERTS_PER_RANK, size * MAX_TOKENS, HIDDEN), dtype=torch.bfloat16, device=comm.device
                ),
                torch.zeros(EXPERTS_PER_RANK, dtype=torch.int64, device=comm.device),
            ]
            for _ in range(steps)
        ]
        ys = [torch.full_like(x, float("nan")) for x, _, _ in inputs]

        def run():
            for (x, ids, weights), (rows, counts), y in zip(inputs, received, ys, strict=True):
                recv, hook = buf.decode_dispatch(x, ids, quant=None)
                hook()
                rows.copy_(recv.x)  # the tensors are overwritten two steps later
                counts.copy_(recv.counts)
                recv.handle.rows.copy_(recv.x.to(torch.float32) * (r + 1) / 4)
                buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False, out=y)

        run()  # one run before the capture
        graph, _ = captured(comm, run)
        last = None
        for n in range(101):
            last = [
                [(x.float() * (n + 2 + s) / 8).bfloat16() for x in world[0]] for s, world in enumerate(worlds)
            ]
            for (x, _, _), xs in zip(inputs, last, strict=True):
                x.copy_(xs[r])
            graph.replay()
        torch.cuda.current_stream().synchronize()
        for s, (world, xs) in enumerate(zip(worlds, last, strict=True)):
            want, _, sums = oracle_of((xs, *world[1:]), None, ranks_per_node=per_node)
            rows, counts = received[s]
            assert_same(counts.cpu(), want[r].counts, f"rank {r}, step {s}: counts")
            for e, count in enumerate(want[r].counts.tolist()):
                assert_same(
                    rows[e, :count].cpu(), want[r].x[e, :count], f"rank {r}, step {s}: x of expert {e}"
                )
            assert_same(ys[s].cpu(), sums[r], f"rank {r}, step {s}: y")
        # Continue without the graph.
        x, ids, _weights = inputs[0]
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        expect_received(
            recv,
            oracle_of((last[0], *worlds[0][1:]), None, ranks_per_node=per_node)[0][r],
            f"rank {r}, behind the graph",
        )
        comm.barrier()
        buf.close()

    moecomm.run_local(rank_main, size, ranks_per_node=per_node, device="cuda:0")


@real_gpu
def test_a_capture_must_be_whole():
    """A message sent before a capture and received in it is refused; handles do not cross the ends of a capture."""

    def rank_main(comm):
        buf = make_buffer(comm)
        x, ids, weights = (t[0].to(comm.device) for t in make_world(1, seed=3))
        recv, hook = buf.decode_dispatch(x, ids, quant=None)
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(moecomm.InvalidArgument, match="calls of its hooks first"),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            buf.decode_dispatch(x, ids, quant=None)
        hook()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        with pytest.raises(moecomm.InvalidArgument, match="handle is too old"):
            buf.decode_combine(recv.handle.rows, ids, weights, recv.handle)
        buf.close()

    moecomm.run_local(rank_main, 1, ranks_per_node=1, device="cuda:0")


def test_bad_ids_are_told_when_the_host_waits(gpu):  # noqa: F811
    """The kernel refuses before any data moves; the buffer stays usable."""

    def rank_main(comm):
        buf = make_buffer(comm)
        x, ids, _ = (t[0].to(comm.device) for t in make_world(1, seed=4))
        bad = ids.clone()
        bad[0, 0] = EXPERTS_PER_RANK
        with pytest.raises(moecomm.InvalidArgument, match="out of range in token 0"):
            buf.decode_dispatch(x, bad, quant=None, return_hook=False)
            comm.synchronize()
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        expect_received(
            recv,
            oracle_of(
                tuple([t] for t in (x.cpu(), ids.cpu(), torch.ones(ids.shape))), None, ranks_per_node=1
            )[0][0],
            "after the refusal",
        )
        buf.close()

    moecomm.run_local(rank_main, 1, ranks_per_node=1, device="cuda:0")


def test_a_missing_rank_times_out_in_decode(gpu):  # noqa: F811
    """The kernel ends at its own deadline, the error names the suspected rank, and the CUDA context survives."""

    def rank_main(comm):
        buf = make_buffer(comm)
        if comm.rank == 0:
            x, ids, _ = (t[0].to(comm.device) for t in make_world(2, seed=5))
            with pytest.raises(moecomm.PeerTimeout) as caught:
                buf.decode_dispatch(x, ids, return_hook=False)
                comm.synchronize()
            assert caught.value.peer == 1
            assert float(torch.ones(3, device=comm.device).sum()) == 3

    moecomm.run_local(rank_main, 2, ranks_per_node=2, device="cuda:0", timeout=3.0)


@real_gpu
def test_async_op_orders_the_callers_stream():
    """The call starts after the current work of the caller's stream.

    wait() makes that stream wait for the call's event, without blocking the host.
    """
    size = 2
    xs, ids, weights = make_world(size, seed=6)
    want = reference.dispatch(xs, ids, weights, num_experts=EXPERTS_PER_RANK * size, capacity=100)
    rows = [(w.x.float() * (r + 1) / 4).bfloat16() for r, w in enumerate(want)]
    sums = reference.combine(rows, want, [len(x) for x in xs], topk_weights=[w.topk_weights for w in want])

    def rank_main(comm):
        buf, r = (
            moecomm.Buffer(
                comm,
                hidden=HIDDEN,
                num_experts=EXPERTS_PER_RANK * size,
                top_k=TOP_K,
                max_tokens=MAX_TOKENS,
                num_sms=2,
            ),
            comm.rank,
        )
        caller = torch.cuda.current_stream()
        x, i, w = (torch.zeros_like(t[r], device=comm.device) for t in (xs, ids, weights))
        ready = [t[r].to(comm.device) for t in (xs, ids, weights)]
        buf.dispatch(*ready, capacity=100)  # load kernels and memory before streams are delayed
        caller.synchronize()
        comm.barrier()
        torch.cuda._sleep(200_000_000)  # the inputs are not complete yet: only the caller's stream knows when
        for to, now in zip((x, i, w), ready, strict=True):
            to.copy_(now)
        pending = buf.dispatch(x, i, w, capacity=100, async_op=True)
        assert isinstance(pending.event, torch.cuda.Event) and not pending.done()  # after the caller's sleep
        out = pending.wait()
        assert not caller.query()  # wait() did not block the host
        snapshot = out.x.clone()  # on the caller's stream, after the event
        out.handle.rows.copy_(snapshot.float() * (r + 1) / 4)
        y = torch.full(xs[r].shape, float("nan"), dtype=torch.bfloat16, device=comm.device)
        combined = buf.combine(
            out.handle.rows, out.handle, topk_weights=out.topk_weights, out=y, async_op=True
        )
        result = combined.wait().clone()
        caller.synchronize()
        assert pending.event.query() and combined.event.query() and combined.done()
        assert_same(snapshot.cpu(), want[r].x, f"rank {r}: x")
        assert_same(result.cpu(), sums[r], f"rank {r}: y")
        comm.barrier()
        buf.close()

    moecomm.run_local(rank_main, size, ranks_per_node=1, device="cuda:0")


def same_tensors(got, want, what):
    """Compare bits; any NaN equals any other."""
    for g, w in zip(got, want, strict=True):
        g = g.cpu()
        assert g.shape == w.shape and g.dtype == w.dtype and g.stride() == w.stride(), what
        if g.dtype in (torch.bfloat16, torch.float16, torch.float32):
            nan = torch.isnan(w)
            assert bool((torch.isnan(g) == nan).all()), what
            g, w = g.masked_fill(nan, 0), w.masked_fill(nan, 0)
        assert_same(g, w, what)


@real_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (3, 48), (130, 17), (257, 200), (64, 7168)])
def test_quantization_equals_the_cpu(dtype, shape):
    g = torch.Generator().manual_seed(shape[0])
    x = (torch.randn(shape, generator=g) * torch.exp2(10 * torch.rand(shape, generator=g))).to(dtype)
    x[0, ::5] = float("inf")
    there = x.cuda()
    for tile in ((1, 128), (128, 1), (128, 128)):
        for scale in ("f32", "ue8m0"):
            for layout in ("row", "column"):
                codes = quant.quantize(x, tile=tile, scale=scale, scale_layout=layout)
                same_tensors(
                    quant.quantize(there, tile=tile, scale=scale, scale_layout=layout),
                    codes,
                    f"{tile} {scale} {layout}",
                )
            values = quant.dequantize(*codes, tile=tile, dtype=dtype)
            same_tensors(
                [quant.dequantize(*(t.cuda() for t in codes), tile=tile, dtype=dtype)],
                [values],
                f"back from {tile} {scale}",
            )
    rows = quant.quantize(x)
    for scale in ("f32", "ue8m0"):
        same_tensors(
            quant.transpose_requantize(*(t.cuda() for t in rows), scale=scale),
            quant.transpose_requantize(*rows, scale=scale),
            "transposed",
        )
    oracle = reference_quant.quantize(x)
    same_tensors(quant.quantize(there), oracle, "the oracle")
    if shape[1] * dtype.itemsize % 16 == 0:
        for wire in ("fp8", "logfmt10"):
            wired = quant.encode_wire(x, wire)
            same_tensors([quant.encode_wire(there, wire)], [wired], wire)
            same_tensors(
                [quant.decode_wire(wired.cuda(), shape[1], wire, dtype=dtype)],
                [quant.decode_wire(wired, shape[1], wire, dtype=dtype)],
                wire,
            )
    else:
        with pytest.raises(moecomm.InvalidArgument, match="multiple of 16"):
            quant.encode_wire(there, "fp8")


def test_rows_that_start_between_16_bytes_are_refused(gpu):  # noqa: F811
    """A view into the middle of a tensor is refused by name before any data moves, and the buffer stays usable."""

    def rank_main(comm):
        buf = make_buffer(comm)
        x, ids, weights = (t[0].to(comm.device) for t in make_world(1, seed=8))

        def shifted(t):
            room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
            return room[1:].view(t.shape).copy_(t)

        for verb in (buf.dispatch, buf.decode_dispatch):
            with pytest.raises(
                moecomm.InvalidArgument, match="x must be 16-byte aligned, but its address is 2 mod 16"
            ):
                verb(shifted(x), ids, quant=None)
        out = buf.dispatch(x, ids)
        with pytest.raises(
            moecomm.InvalidArgument, match="out must be 16-byte aligned, but its address is 2 mod 16"
        ):
            buf.combine(out.handle.rows, out.handle, out=shifted(x))
        y = buf.combine(shifted(out.x), out.handle)  # copied first, so any alignment is valid
        assert_same(buf.combine(out.handle.rows.copy_(out.x), out.handle).cpu(), y.cpu(), "y")
        recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
        with pytest.raises(
            moecomm.InvalidArgument, match="rows must be 16-byte aligned, but its address is 2 mod 16"
        ):
            buf.decode_combine(shifted(recv.x), ids, weights, recv.handle)
        comm.barrier()
        buf.close()

    moecomm.run_local(rank_main, 1, ranks_per_node=1, device="cuda:0")
