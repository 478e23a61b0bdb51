"""The contract of deep_ep's ElasticBuffer in plain torch, and a rank's checks against it."""

from __future__ import annotations

import torch
from deep_ep_oracle import arrivals, assert_close, rows_of, summed
from worlds import assert_same, random_world

from moecomm.integrations import deep_ep


def expanded(ids, num_experts, size, rank, alignment):
    """Return [(source rank, token, pick), or None for padding] of a rank's rows, and the real rows per local expert."""
    local, rows, counts = num_experts // size, [], []
    for e in range(rank * local, (rank + 1) * local):
        here = [
            (s, t, ids[s][t].tolist().index(e))
            for s in range(size)
            for t in range(len(ids[s]))
            if e in ids[s][t].tolist()
        ]
        counts.append(len(here))
        rows += here + [None] * (-len(here) % alignment)
    return rows, counts


def pick(values, rows):
    """Return values[rank][token] of every row, and zeros for padding."""
    nothing = torch.zeros(values[0].shape[1:], dtype=values[0].dtype)
    return torch.stack([values[r[0]][r[1]] if r else nothing for r in rows]) if rows else values[0][:0]


def check(group, rank, size, nodes=1):
    """Check both layouts, with and without counts on the host: cached plans, combine, weights, biases and counts."""
    experts, k, most = 4 * size, 3, 20
    buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=most, hidden=256)
    assert buffer.num_bytes % (2 << 20) == 0 and (
        buffer.rank_idx,
        buffer.num_ranks,
        buffer.num_max_tokens_per_rank,
    ) == (rank, size, most)
    assert (
        (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks)
        == (buffer.num_rdma_ranks, buffer.num_nvlink_ranks)
        == (nodes, size // nodes)
    )
    for seed, tokens in ((0, 20), (1, [0, 20, 3, 7][:size]), (2, [0] * size)):
        xs, ids, weights = random_world(size, tokens, 256, experts, k, seed=seed, masked=0.3)
        ids = [
            i.masked_fill(i >= 2 * size, -1) if seed == 1 else i for i in ids
        ]  # skew: no picks in the upper half
        for sync in (True, False):
            check_plain(buffer, rank, size, nodes, xs, ids, weights, experts, most, sync)
            check_expanded(buffer, rank, size, xs, ids, weights, experts, most, sync)
    buffer.barrier()


def check_plain(buffer, rank, size, nodes, xs, ids, weights, experts, most, sync):
    """Check the layout with one row per token and rank."""
    x, local = xs[rank], experts // size
    arrived = arrivals(ids, weights, experts, size)
    want, stats = arrived[rank], torch.full((local,), 5, dtype=torch.int32)
    recv_x, recv_ids, recv_weights, handle, event = buffer.dispatch(
        x, ids[rank], weights[rank], stats, experts, expert_alignment=4, do_cpu_sync=sync
    )
    n = len(want.sources)
    assert recv_x.shape[0] == (n if sync else size * most) and event.event is None
    assert_same(recv_x[:n], rows_of(xs, want), "recv_x")
    assert_same(recv_ids[:n], want.ids, "recv_topk_idx")
    assert_same(recv_weights[:n], want.weights, "recv_topk_weights")
    assert (recv_ids[n:] == -1).all()
    assert stats.tolist() == [5 + c for c in want.counts]
    assert handle.num_recv_tokens_per_expert_list == ([-(-c // 4) * 4 for c in want.counts] if sync else [])
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == want.counts
    assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(want.counts).cumsum(0).tolist()
    places = [sum(s % (size // nodes) <= p for s, _ in want.sources) for p in range(size // nodes)]
    assert (
        handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == places
        and handle.num_recv_tokens == n
        and handle.num_expanded_tokens == 0
    )
    assert (
        handle.topk_idx.equal(ids[rank])
        and not handle.do_expand
        and (handle.num_experts, handle.expert_alignment) == (experts, 4)
    )
    again = buffer.dispatch(x * 2, topk_weights=weights[rank] * 2, handle=handle, num_sms=handle.num_sms)
    assert_same(again[0][:n], rows_of([v * 2 for v in xs], want), "cached recv_x")
    assert_same(again[2][:n], want.weights * 2, "cached recv_topk_weights")
    assert again[1] is None and again[3] is handle
    rows = [(rows_of(xs, a).double() * (r + 1) / 4).to(x.dtype) for r, a in enumerate(arrived)]
    numbers = [
        torch.rand((len(a.sources), ids[0].shape[1]), generator=torch.Generator().manual_seed(r))
        for r, a in enumerate(arrived)
    ]
    fill = (0, 0, 0, recv_x.shape[0] - n)
    y, w_sum, _ = buffer.combine(
        torch.nn.functional.pad(rows[rank], fill),
        handle,
        torch.nn.functional.pad(numbers[rank], fill),
        (x, x + 1),
    )
    assert_close(y, summed(rows, arrived, len(x), rank) + x.double() + (x + 1).double(), "combined_x")
    assert_close(w_sum, summed(numbers, arrived, len(x), rank), "combined_topk_weights")


def check_expanded(buffer, rank, size, xs, ids, weights, experts, most, sync):
    """Check the layout with one row per token and local expert, padded."""
    x, local, k = xs[rank], experts // size, ids[0].shape[1]
    rows, counts = expanded(ids, experts, size, rank, 8)
    fp8 = [v.to(torch.float8_e4m3fn) for v in xs]
    sf = [
        torch.arange(len(v) * 8, dtype=torch.int32).view(-1, 8) * 5 + r for r, v in enumerate(xs)
    ]  # MXFP8: a scale per 32 elements, packed
    (recv_x, recv_sf), recv_ids, recv_weights, handle, event = buffer.dispatch(
        (fp8[rank], sf[rank]),
        ids[rank],
        weights[rank],
        num_experts=experts,
        expert_alignment=8,
        do_expand=True,
        do_zero_padding=True,
        do_cpu_sync=sync,
        use_tma_aligned_col_major_sf=True,
        async_with_compute_stream=True,
    )
    event.current_stream_wait()
    n, worst = len(rows), -(-(size * most * min(k, local) + 7 * local) // 8) * 8
    assert recv_ids is None and recv_x.shape[0] == recv_sf.shape[0] == recv_weights.shape[0] == (
        n if sync else worst
    )
    assert_same(
        recv_x[:n].view(torch.uint8), pick([v.view(torch.uint8) for v in fp8], rows), "expanded recv_x"
    )
    assert_same(recv_sf[:n].contiguous(), pick(sf, rows), "expanded scales")
    assert (recv_sf.stride()[0] == 1 and recv_sf.stride(1) * 4 % 16 == 0) or not len(recv_sf)
    assert recv_weights[:n].tolist() == [float(weights[r[0]][r[1], r[2]]) if r else 0.0 for r in rows]
    padded = [-(-c // 8) * 8 for c in counts]
    assert (
        handle.num_recv_tokens_per_expert_list == (padded if sync else [])
        and handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
    )
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [
        sum(padded[:e]) + c for e, c in enumerate(counts)
    ]
    assert (
        handle.num_recv_tokens == len({r[:2] for r in rows if r})
        and handle.num_expanded_tokens == recv_x.shape[0]
        and handle.do_expand
    )
    again = buffer.dispatch(x, handle=handle)[0]
    assert_same(again[:n], pick(xs, rows), "cached expanded recv_x")
    numbers = torch.rand(recv_x.shape[0], generator=torch.Generator().manual_seed(rank))
    y, back, _ = buffer.combine(again, handle, recv_weights * 2, bias=x)
    held = (ids[rank] >= 0).sum(1, keepdim=True)
    assert_close(y, x.double() * held + x.double(), "expanded combined_x")
    assert_same(back, weights[rank] * 2 * (ids[rank] >= 0), "expanded combined_topk_weights")
    assert_close(
        buffer.combine(again.float(), handle, numbers)[0], x.double() * held, "expanded, another dtype"
    )
