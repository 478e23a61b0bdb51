"""The contract of deep_ep's HybridEPBuffer in plain torch, and a rank's checks against it."""

from __future__ import annotations

import torch
from deep_ep_elastic import expanded, pick
from deep_ep_oracle import arrivals, assert_close, rows_of, summed
from worlds import assert_same, random_world

from moecomm.integrations import deep_ep


def check(group, rank, size, nodes=1):
    """Check both dispatches, with ids and with maps.

    Covers budgets and overflow, cached plans, FP8 rows, combine, and the probabilities that combine returns.
    """
    experts, local, most = 4 * size, 4, 20
    per_node = local * size // nodes
    buffer = deep_ep.HybridEPBuffer(group, 128, most, local, num_sms_preprocessing_api=108)
    config = buffer.configurer.buffer_config
    assert (
        config.hidden_dim,
        config.max_num_of_tokens_per_rank,
        config.num_of_experts_per_rank,
        buffer.num_sms_preprocessing_api,
    ) == (128, most, local, 108)
    for seed, tokens in ((0, 20), (1, [0, 20, 3, 7][:size]), (2, [0] * size)):
        xs, ids, weights = random_world(size, tokens, 128, experts, 3, seed=seed, masked=0.3)
        maps = [
            deep_ep.hybrid_ep_buffer.indices_to_map(i, w, len(i), experts)
            for i, w in zip(ids, weights, strict=True)
        ]
        for t in range(len(ids[rank])):  # the picks as a map
            assert maps[rank][0][t].nonzero().view(-1).tolist() == sorted(
                e for e in ids[rank][t].tolist() if e >= 0
            )
            assert all(
                maps[rank][1][t, e] == w
                for e, w in zip(ids[rank][t].tolist(), weights[rank][t], strict=True)
                if e >= 0
            )
        check_tokens(buffer, rank, size, xs, ids, weights, maps, experts, per_node)
        check_permuted(buffer, rank, size, xs, ids, maps, experts)
    assert buffer.update_template_config(max_num_of_tokens_per_rank=30).max_num_of_tokens_per_rank == 30
    buffer.empty_jit_cache()


def check_tokens(buffer, rank, size, xs, ids, weights, maps, experts, per_node):
    """Check the dispatch with one row per token and rank."""
    arrived, local = arrivals(ids, weights, experts, size), experts // size
    want, here = arrived[rank], slice(rank * local, (rank + 1) * local)
    first = rank * local % per_node
    token, probs, scales, handle = buffer.dispatch(
        xs[rank], topk_idx=ids[rank], topk_weights=weights[rank], num_of_experts=experts
    )
    assert_same(token, rows_of(xs, want), "token")
    dense = torch.zeros((len(token), per_node))
    dense[:, first : first + local] = rows_of([m[1] for m in maps], want)[:, here]
    assert_same(probs, dense, "probs")
    assert scales is None and len(handle) == 7 and int(handle[3]) == len(token) and handle[5] == len(xs[rank])
    assert_same(
        handle[4], rows_of([m[0] for m in maps], want)[:, here].contiguous(), "local_expert_routing_map"
    )
    y, back = buffer.combine(token, probs * 2, tuple(handle))
    assert_close(y, summed([rows_of(xs, a) for a in arrived], arrived, len(xs[rank]), rank), "combined token")
    assert_close(back, maps[rank][1].double() * 2, "combined probs")
    again = buffer.dispatch(xs[rank] * 2, handle=handle)
    assert_same(again[0], rows_of([x * 2 for x in xs], want), "cached token")
    assert again[1] is again[2] is None and again[3] is handle
    by_map = buffer.dispatch(hidden=xs[rank], routing_map=maps[rank][0])
    assert_same(by_map[0], token, "token by map")
    assert by_map[1] is None


def check_permuted(buffer, rank, size, xs, ids, maps, experts):
    """Check the dispatch with one row per token and expert."""
    rows, counts = expanded(ids, experts, size, rank, 4)
    n, padded = len(rows), [-(-c // 4) * 4 for c in counts]
    held = (ids[rank] >= 0).sum(1, keepdim=True).double()
    probs = [
        float(maps[r[0]][1][r[1], e]) if r else 0.0
        for r, e in zip(
            rows, (rank * len(counts) + e for e, c in enumerate(padded) for _ in range(c)), strict=True
        )
    ]
    for budget in (None, 4 * sum(map(len, xs)) + 4):
        token, recv_probs, scales, per_expert, handle = buffer.dispatch_with_permute(
            hidden=xs[rank],
            routing_map=maps[rank][0],
            probs=maps[rank][1],
            num_of_experts=experts,
            pad_multiple=4,
            num_permuted_tokens=budget,
            non_blocking=budget is not None,
            fuse_permute_dispatch=True,
        )
        assert token.shape[0] == recv_probs.shape[0] == (n if budget is None else budget) and scales is None
        assert_same(token[:n], pick(xs, rows), "permuted token")
        assert recv_probs[:n].tolist() == probs and not token[n:].any() and not recv_probs[n:].any()
        assert (
            per_expert.tolist() == padded
            and len(handle) == 11
            and handle[7] is per_expert
            and handle[8] == len(xs[rank])
            and int(handle[10]) == 0
        )
        again = buffer.dispatch_with_permute(
            hidden=xs[rank] * 2, handle=handle, pad_multiple=4, num_permuted_tokens=len(token)
        )
        assert_same(again[0][:n], pick([x * 2 for x in xs], rows), "cached permuted token")
        assert again[1] is None and again[4] is handle
        y, back = buffer.combine_with_unpermute(
            hidden=token, probs=recv_probs * 2, handle=tuple(handle), pad_multiple=4
        )
        assert_close(y, xs[rank].double() * held, "unpermuted token")
        assert_same(back, maps[rank][1] * 2, "unpermuted probs")
        assert buffer.combine_with_unpermute(hidden=token, handle=handle)[1] is None
    codes = [
        (x.to(torch.float8_e4m3fn).view(torch.uint8), torch.full((len(x), 1), float(r + 1)))
        for r, x in enumerate(xs)
    ]
    token, _, scales, *_ = buffer.dispatch_with_permute(
        hidden=codes[rank][0], scaling_factor=codes[rank][1], topk_idx=ids[rank], use_fp8=True
    )
    packed = expanded(ids, experts, size, rank, 1)[0]
    assert_same(token, pick([c[0] for c in codes], packed), "FP8 token")
    assert_same(scales.contiguous(), pick([c[1] for c in codes], packed), "scaling factors")
    token, recv_probs, _, per_expert, handle = (
        buffer.dispatch_with_permute(  # too small for some rank, unless there are no tokens
            hidden=xs[rank],
            routing_map=maps[rank][0],
            probs=maps[rank][1],
            pad_multiple=4,
            num_permuted_tokens=4,
            non_blocking=True,
        )
    )
    assert int(handle[10]) == (n > 4) and len(token) == 4 and int(per_expert.sum()) == min(n, 4)
    assert_same(token[: min(n, 4)], pick(xs, rows[:4]), "rows within the budget")
    y = buffer.combine_with_unpermute(hidden=token, handle=handle)[0]
    assert y.shape == xs[rank].shape and (y.double().abs() <= xs[rank].double().abs() * held * 1.02).all()
