"""Parts of HybridEPBuffer: maps of picks, its handles, and what a call begins with."""

from __future__ import annotations

import torch

from ._checks import capturing, check_int
from ._routing import Payload, Routing
from .errors import Unsupported, refuse, require_tensor
from .handles import Opaque
from .maps import indices_to_map


def begin(
    op,
    world,
    config,
    hidden,
    scaling_factor,
    topk_idx,
    topk_weights,
    num_of_experts,
    experts_per_rank,
    probs,
    routing_map,
    handle,
    same,
    how,
):
    """(Routing, Payload, weights [T, K] or None) of a call; ranks agree on the picks per token where there
    is no handle.
    """
    world.require_open(op)
    refusal, most = None, (0, 1)
    try:
        payload = Payload(op, hidden if scaling_factor is None else (hidden, scaling_factor))
        if handle is not None:
            routing = state_of(op, handle, "expert" if same["permuted"] else "rank", world)[0]
            if any(value is not None for value in (topk_idx, topk_weights, routing_map, probs)):
                refuse(
                    op,
                    "topk_idx, topk_weights, routing_map or probs are given with a handle; expected none of them",
                    world.rank,
                )
            if payload.tokens != routing.tokens:
                refuse(
                    op,
                    f"hidden has {payload.tokens} tokens; the handle is for {routing.tokens}",
                    world.rank,
                )
            return routing, payload, None
        local = config.num_of_experts_per_rank if experts_per_rank is None else experts_per_rank
        check_int(op, "num_of_experts_per_rank", local, 1, world.rank)
        experts = local * world.size
        if num_of_experts is not None and num_of_experts != experts:
            refuse(
                op,
                f"num_of_experts is {num_of_experts}; expected {local} experts per rank times {world.size} ranks",
                world.rank,
            )
        if capturing():
            raise Unsupported(
                f"{op}: a CUDA graph is captured, and the host must learn how many picks and rows there "
                f"are; expected the first dispatch "
                "outside, and calls with its handle inside, or ElasticBuffer.dispatch(do_cpu_sync=False)",
                op=op,
                rank=world.rank,
            )
        if (topk_idx is None) == (routing_map is None):
            refuse(
                op,
                "topk_idx and routing_map are both None or both given; expected one of them, or a handle",
                world.rank,
            )
        if topk_idx is not None:
            routing_map, probs = indices_to_map(topk_idx, topk_weights, payload.tokens, experts)
        chosen = require_tensor(
            op, "routing_map", routing_map, dtypes=(torch.bool,), shape=(payload.tokens, experts)
        )
        probs = require_tensor(
            op, "probs", probs, optional=True, dtypes=(torch.float32,), shape=(payload.tokens, experts)
        )
        picks = int(chosen.sum(1).max()) if payload.tokens else 1
        if picks > 32:
            refuse(op, f"a token goes to {picks} experts; expected at most 32", world.rank)
        most = payload.tokens, picks
        same = {**same, **payload.same, "experts": experts, "probs given": probs is not None}
        call = how(picks, local)
    except Exception as error:
        if handle is not None:
            raise
        refusal = error
    most, k = world.agree(op, same=same, most=most, refusal=refusal)
    # the buffer grows with what comes, as hybrid-ep's does
    config.hidden_dim, config.max_num_of_tokens_per_rank = (
        max(config.hidden_dim, payload.width),
        max(config.max_num_of_tokens_per_rank, most),
    )
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
        :, :k
    ]  # a token's experts in ascending order
    picked = chosen.gather(1, order)
    weights = None if probs is None else probs.gather(1, order) * picked
    return Routing(world, torch.where(picked, order, -1), experts, most, 20, call), payload, weights


def state_of(op, handle, layout, world):
    """(Routing, budget of rows or None) of a handle, also of a tuple that was made again from its items."""
    if (
        not isinstance(handle, (tuple, list))
        or not handle
        or not isinstance(handle[0], Opaque)
        or handle[0]._state is None
    ):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch of this library",
            world.rank,
        )
    routing, budget = handle[0]._state
    if routing.world is not world or routing.how["layout"] != layout:
        refuse(
            op,
            "handle comes from another group, or from the other dispatch; expected that of this verb's counterpart",
            world.rank,
        )
    return routing, budget


def rows_of(routing, budget):
    """Rows that the caller sees."""
    return routing.num_rows if budget is None else budget


def received(payload, out):
    """(rows, scales or None) of a dispatch."""
    got = payload.received(out)
    return got if isinstance(got, tuple) else (got, None)


def fit(t, rows):
    """The first rows of a tensor, filled up with zeros where it has fewer."""
    if len(t) >= rows:
        return t[:rows]
    return torch.cat([t, torch.zeros((rows - len(t), *t.shape[1:]), dtype=t.dtype, device=t.device)])
