"""The contract of deep_ep in plain torch, and the checks of one rank against it, for rank threads and processes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

import torch
from worlds import assert_same, random_world

import moecomm
from moecomm.integrations import deep_ep


class Arrived(NamedTuple):
    """Rows that one rank receives: one per (source rank, source token) with a pick on this rank."""

    sources: list
    ids: torch.Tensor
    weights: torch.Tensor
    counts: list


def arrivals(ids, weights, num_experts, size):
    """Return Arrived of every rank from the [T, K] picks of all ranks."""
    local, out = num_experts // size, []
    for r in range(size):
        sources = [
            (s, t)
            for s in range(size)
            for t in range(len(ids[s]))
            if any(r * local <= e < (r + 1) * local for e in ids[s][t].tolist())
        ]
        here = (
            torch.stack([ids[s][t] for s, t in sources]) - r * local
            if sources
            else torch.empty((0, ids[0].shape[1]), dtype=torch.int64)
        )
        mine = (here >= 0) & (here < local)
        given = (
            torch.stack([weights[s][t] for s, t in sources]) if sources else torch.empty((0, ids[0].shape[1]))
        )
        out.append(
            Arrived(
                sources,
                here.masked_fill(~mine, -1),
                given * mine,
                [int((here == e).sum()) for e in range(local)],
            )
        )
    return out


def rows_of(values, arrived):
    """Return values[rank][token] of every received row."""
    return torch.stack([values[s][t] for s, t in arrived.sources]) if arrived.sources else values[0][:0]


def summed(rows, arrived, tokens, rank):
    """Sum the rows of all ranks for the tokens of this rank: float64 [tokens, ...]."""
    y = torch.zeros((tokens, *rows[0].shape[1:]), dtype=torch.float64)
    for there, values in zip(arrived, rows, strict=True):
        for i, (s, t) in enumerate(there.sources):
            if s == rank:
                y[t] += values[i].double()
    return y


def assert_close(got, want, what):
    """Assert that values are equal up to the rounding of the result's dtype."""
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    limit = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 1e-5, torch.float64: 1e-12}[
        got.dtype
    ] * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    assert got.shape == want.shape and error <= limit, (
        f"{what}: {tuple(got.shape)} for {tuple(want.shape)}, error {error}, limit {limit}"
    )


def layout_and_dispatch(buffer, x, ids, weights, num_experts, **more):
    """Call get_dispatch_layout and dispatch, as clients do."""
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_experts)
    return buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=ids,
        topk_weights=weights,
        **more,
    )


def check_normal(group, rank, size, nodes=1):
    """Check layout, dispatch and combine on random worlds.

    Covers skew, empty ranks, -1, growth, FP8, bytes and cached plans.
    """
    buffer = deep_ep.Buffer(group, 1 << 20, 0)
    for seed, tokens, dtype, experts, k in (
        (0, 5, torch.bfloat16, 8, 3),
        (1, [0, 40, 3, 0][:size], torch.float32, 4, 1),
        (2, 70, torch.bfloat16, 8, 3),
        (3, [0] * size, torch.bfloat16, 8, 3),
    ):
        xs, ids, weights = random_world(size, tokens, 256, experts, k, dtype, seed, masked=0.3)
        ids = [
            i.masked_fill(i >= experts // 2, -1) if seed == 2 else i for i in ids
        ]  # skew: no picks in the upper half
        check_one(buffer, rank, size, nodes, xs, ids, weights, experts)
        check_formats(buffer, rank, size, xs, ids, weights, experts)
    check_without_ids(buffer, rank, size)


def check_one(buffer, rank, size, nodes, xs, ids, weights, experts):
    """Run one world through layout, dispatch, cached dispatch, worst-case dispatch and combine."""
    x, mine, w = xs[rank], ids[rank], weights[rank]
    arrived, k, local = arrivals(ids, weights, experts, size), mine.shape[1], experts // size
    want = arrived[rank]
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(mine, experts)
    reach = [
        [t for t in range(len(mine)) if any(e >= 0 and e // local == r for e in mine[t].tolist())]
        for r in range(size)
    ]
    assert per_rank.dtype == torch.int32 and per_rank.tolist() == [len(tokens) for tokens in reach]
    assert per_expert.dtype == torch.int32 and per_expert.tolist() == [
        int((mine == e).sum()) for e in range(experts)
    ]
    assert (
        in_rank.dtype == torch.bool
        and in_rank.shape == (len(mine), size)
        and [in_rank[:, r].nonzero().view(-1).tolist() for r in range(size)] == reach
    )
    assert event.event is None
    if nodes == 1:
        assert per_node is None
    else:
        assert per_node.dtype == torch.int32
        assert per_node.tolist() == [
            len({t for r in range(n * size // nodes, (n + 1) * size // nodes) for t in reach[r]})
            for n in range(nodes)
        ]
    recv_x, recv_ids, recv_weights, counts, handle, event = layout_and_dispatch(
        buffer, x, mine, w, experts, expert_alignment=4
    )
    assert_same(recv_x, rows_of(xs, want), "recv_x")
    assert_same(recv_ids, want.ids, "recv_topk_idx")
    assert_same(recv_weights, want.weights, "recv_topk_weights")
    assert counts == [-(-n // 4) * 4 for n in want.counts] and event.event is None
    again = buffer.dispatch(x * 2, handle=handle, config=deep_ep.Config(num_sms=4))
    assert_same(again[0], rows_of([v * 2 for v in xs], want), "cached recv_x")
    assert again[1:5] == (None,) * 4
    rows = [(rows_of(xs, a).double() * (r + 1) / 4).to(x.dtype) for r, a in enumerate(arrived)]
    y, nothing, event = buffer.combine(rows[rank], handle)
    assert nothing is None and y.dtype == x.dtype
    assert_close(y, summed(rows, arrived, len(x), rank), "combined_x")
    numbers = [
        torch.rand((len(a.sources), k), generator=torch.Generator().manual_seed(r))
        for r, a in enumerate(arrived)
    ]
    bias = x + 1
    y, w_sum, event = buffer.combine(
        rows[rank], handle, topk_weights=numbers[rank], bias=(bias, bias), async_finish=True
    )
    event.current_stream_wait()
    assert_close(y, summed(rows, arrived, len(x), rank) + 2 * bias.double(), "combined_x with two biases")
    assert_close(w_sum, summed(numbers, arrived, len(x), rank), "combined_topk_weights")
    ones = buffer.combine(
        rows[rank].float(), handle, topk_weights=torch.ones_like(numbers[rank]), bias=x.float()
    )
    assert_close(
        ones[0],
        summed([r.float() for r in rows], arrived, len(x), rank) + x.float().double(),
        "a combine of another dtype",
    )
    assert_close(ones[1], in_rank.sum(1).double()[:, None].expand(-1, k), "ones: rows per token")
    worst = sum(map(len, xs)) + 3
    recv_x, recv_ids, recv_weights, counts, handle, _ = layout_and_dispatch(
        buffer, x, mine, w, experts, num_worst_tokens=worst
    )
    real = len(want.sources)
    assert counts == [] and recv_x.shape[0] == recv_ids.shape[0] == recv_weights.shape[0] == worst
    assert_same(recv_x[:real], rows_of(xs, want), "recv_x with worst tokens")
    assert (recv_ids[real:] == -1).all() and not recv_x[real:].any()
    y = buffer.combine(torch.nn.functional.pad(rows[rank], (0, 0, 0, worst - real)), handle)[0]
    assert_close(y, summed(rows, arrived, len(x), rank), "combined_x with worst tokens")


def check_formats(buffer, rank, size, xs, ids, weights, experts):
    """Check FP8 pairs that moecomm's core supports, and opaque rows and scales, also with a cached plan."""

    def scaled(value, columns, dtype):
        return (torch.arange(len(value) * columns).view(len(value), columns) * 7 % 251 + value.shape[0]).to(
            dtype
        )

    fp8 = [v.to(torch.float8_e4m3fn) for v in xs]
    by_column = [
        scaled(v, 1, torch.int32).as_strided((len(v), 1), (1, len(v))) for v in fp8
    ]  # the scale layout of FP8 GEMMs
    formats = [
        list(zip((v.view(torch.int8) for v in fp8), by_column, strict=True)),
        [(v, scaled(v, 2, torch.float32) + r) for r, v in enumerate(fp8)],
        [(v, scaled(v, 1, torch.int32) + r) for r, v in enumerate(fp8)],
        [(v, scaled(v, 8, torch.uint8) + r) for r, v in enumerate(fp8)],
        [(v.view(torch.int8), scaled(v, 5, torch.int32)) for v in fp8],
        [v.float().to(torch.float8_e5m2) for v in xs],
    ]
    want = arrivals(ids, weights, experts, size)[rank]
    for all_ranks in formats:
        mine = all_ranks[rank]
        out = layout_and_dispatch(buffer, mine, ids[rank], weights[rank], experts)
        for recv in (out[0], buffer.dispatch(mine, handle=out[4])[0]):
            pairs = (
                list(zip(recv, zip(*all_ranks, strict=True), strict=True))
                if isinstance(mine, tuple)
                else [(recv, all_ranks)]
            )
            for got, sent in pairs:
                as_bytes = lambda t: t.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # noqa: E731
                assert_same(as_bytes(got), as_bytes(rows_of(list(sent), want)), "opaque rows")
        y = buffer.combine(rows_of(xs, want), out[4])[0]
        assert y.shape == xs[rank].shape


def check_without_ids(buffer, rank, size):
    """Check rows sent by is_token_in_rank. The returned list has the counts that the callers passed."""
    g = torch.Generator().manual_seed(5)
    xs = [torch.randn((6 + r, 32), generator=g).bfloat16() for r in range(size)]
    where = [torch.rand((len(x), size), generator=g) < 0.5 for x in xs]
    counted = [torch.randint(9, (2 * size,), generator=g, dtype=torch.int32) for _ in range(size)]
    out = buffer.dispatch(
        xs[rank],
        num_tokens_per_rank=where[rank].sum(0, dtype=torch.int32),
        is_token_in_rank=where[rank],
        num_tokens_per_expert=counted[rank],
    )
    assert_same(
        out[0], torch.cat([x[w[:, rank]] for x, w in zip(xs, where, strict=True)]), "recv_x without ids"
    )
    assert out[1] is out[2] is None and out[3] == sum(counted)[2 * rank : 2 * rank + 2].tolist()
    assert_close(
        buffer.combine(out[0], out[4])[0],
        xs[rank].double() * where[rank].sum(1, keepdim=True),
        "combined_x without ids",
    )


def dequantized(rows, scales):
    """Dequantize FP8 rows [.., H] with a scale per 128 elements (float32, or four UE8M0 in an int32) to float32."""
    if scales.dtype == torch.int32:
        exponents = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)[
            ..., : -(-rows.shape[-1] // 128)
        ]
        scales = torch.exp2(exponents.float() - 127)
    return rows.float() * scales.repeat_interleave(128, -1)[..., : rows.shape[-1]]


def check_low_latency(group, rank, size):
    """Check all formats and all ways to wait of the low-latency verbs."""
    experts, k, most, hidden = 4 * size, 3, 12, 512
    local = experts // size
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    stats, expected = torch.zeros(local, dtype=torch.int32), torch.zeros(local, dtype=torch.int32)
    ways = [
        dict(use_fp8=False),
        dict(use_fp8=False, hook=True),
        dict(),
        dict(hook=True),
        dict(round_scale=True, hook=True),
        dict(round_scale=True, use_ue8m0=True),
        dict(use_fp8=False, zero_copy=True),
        dict(use_fp8=False, use_logfmt=True, async_finish=True),
    ]
    for seed, way in enumerate(ways):
        way = dict(way)
        hooked, zero_copy, logfmt = (
            way.pop("hook", False),
            way.pop("zero_copy", False),
            way.pop("use_logfmt", False),
        )
        tokens = [[12] * size, [0, 7, 12, 1][:size]][seed % 2]
        xs, ids, weights = random_world(size, tokens, hidden, experts, k, seed=seed)
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            xs[rank], ids[rank], most, experts, stats, return_recv_hook=hooked, **way
        )
        assert (hook is not None) == hooked and (event.event is not None) == way.get("async_finish", False)
        if hooked:
            hook()
            hook()  # a second call does nothing
        rows, scales = recv if way.get("use_fp8", True) else (recv, None)
        sources = [
            [
                (s, t)
                for s in range(size)
                for t in range(len(ids[s]))
                if rank * local + e in ids[s][t].tolist()
            ]
            for e in range(local)
        ]
        assert (
            count.dtype == torch.int32
            and count.tolist() == list(map(len, sources))
            and rows.shape == (local, size * most, hidden)
        )
        expected += count
        assert stats.tolist() == expected.tolist()
        for e in range(local):
            want = rows_of(xs, Arrived(sources[e], None, None, None))
            if scales is None:
                assert_same(rows[e, : count[e]], want, "low-latency rows")
            elif len(want):
                assert rows.dtype == torch.float8_e4m3fn and scales.stride(1) == 1, "scales are column-major"
                assert scales.dtype == (torch.int32 if way.get("use_ue8m0") else torch.float32)
                assert scales.shape[2] == (1 if way.get("use_ue8m0") else 4)
                assert (
                    dequantized(rows[e, : count[e]], scales[e, : count[e]]) - want.float()
                ).abs().max() <= want.float().abs().max() / 8
            if scales is not None and way.get("round_scale") and not way.get("use_ue8m0"):
                assert (torch.frexp(scales[e, : count[e]])[0] == 0.5).all(), "powers of two"
        assert handle[2] == most and handle[3] == hidden and handle[4] == experts
        answer = torch.zeros((local, size * most, hidden), dtype=torch.bfloat16)
        for e in range(local):
            answer[e, : count[e]] = rows_of(xs, Arrived(sources[e], None, None, None)) * (
                1 + (rank * local + e) % 4
            )
        factor = (weights[rank] * (ids[rank] >= 0) * (1 + ids[rank] % 4)).sum(1, keepdim=True).double()
        for turn in range(3):  # a handle can be combined again, with other rows
            rows = answer * (1 + turn)
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
                rows = torch.empty(0)
            out = torch.full(xs[rank].shape, float("nan"), dtype=torch.bfloat16) if turn else None
            y, _, hook = buffer.low_latency_combine(
                rows, ids[rank], weights[rank], handle, logfmt, zero_copy, return_recv_hook=hooked, out=out
            )
            if hooked:
                hook()
            assert out is None or y is out
            want = xs[rank].double() * factor * (1 + turn)
            error = (y.double() - want).abs().max().item() / (1 + turn) if len(y) else 0
            assert error <= (0.5 if logfmt else 0.15), f"low-latency combine {turn}: {error}"
    buffer.clean_low_latency_buffer(most, hidden, experts)
    status = torch.ones(size, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_update_mask_buffer(0, False)
    assert not status.any()


def main(folder, rank, size, check):
    """Run a check of this module in one process, in a gloo group."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    moecomm.bootstrap.make_default_group(
        init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    deep_ep.configure(timeout=100.0)  # a loaded machine is slow
    deep_ep.install()
    import deep_ep as installed

    assert installed is deep_ep
    globals()[check](torch.distributed.group.WORLD, rank, size)  # a check_ function of this module
    torch.distributed.barrier()
    deep_ep.shutdown()
    torch.distributed.destroy_process_group()


def check_elastic(group, rank, size):
    """Run deep_ep_elastic.check."""
    import deep_ep_elastic

    deep_ep_elastic.check(group, rank, size)


def check_hybrid(group, rank, size):
    """Run deep_ep_hybrid.check."""
    import deep_ep_hybrid

    deep_ep_hybrid.check(group, rank, size)


def run_processes(processes, folder, size, check):
    """Run check(group, rank, size) of this module in separate processes, over gloo."""
    ranks = [processes.Process(target=main, args=(str(folder), r, size, check)) for r in range(size)]
    for p in ranks:
        p.start()
    try:
        for r, p in enumerate(ranks):
            p.join(120)
            assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:
            p.kill()
            p.join()


def with_buffer(fn, **how):
    """Call fn(Buffer) on one rank."""
    return moecomm.run_local(lambda comm: fn(deep_ep.Buffer(comm, **how)), 1)[0]
