"""Parts of Buffer: the layout of a routing, argument checks of dispatch, and its handle."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import IDS, capturing, check_experts, check_int, check_picks
from ._routing import Payload
from .errors import refuse, require_tensor
from .handles import DispatchHandle


def layout_of(ids: Any, experts: Any, ranks: Any) -> Any:
    """(picks per expert int32 [experts], whether a rank gets a token bool [T, ranks]). The ids must be in range."""
    flat = ids.to(torch.int64)
    per_expert = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    per_expert.index_add_(
        0, (flat + 1).view(-1), torch.ones(flat.numel(), dtype=torch.int32, device=ids.device)
    )
    in_rank = torch.zeros((len(ids), ranks + 1), dtype=torch.bool, device=ids.device)
    in_rank.scatter_(1, torch.div(flat, experts // ranks, rounding_mode="floor") + 1, True)
    return per_expert[1:], in_rank[:, 1:].contiguous()


def check_dispatch(
    world: Any,
    x: Any,
    per_rank: Any,
    in_rank: Any,
    per_expert: Any,
    topk_idx: Any,
    topk_weights: Any,
    alignment: Any,
    worst: Any,
) -> Any:
    """Check the arguments of dispatch: (Payload, ids [T, K], weights or None, caller's counts per expert or None)."""
    op = "dispatch"
    payload = Payload(op, x)
    for name, value, kinds, shape in (
        ("num_tokens_per_rank", per_rank, IDS, (world.size,)),
        ("num_tokens_per_expert", per_expert, IDS, (None,)),
        ("is_token_in_rank", in_rank, (torch.bool,), (payload.tokens, world.size)),
    ):
        if value is None:
            refuse(op, f"{name} is None; expected the result of get_dispatch_layout, or a handle", world.rank)
        require_tensor(op, name, value, dtypes=kinds, shape=shape)
    experts = per_expert.numel()
    check_experts(op, experts, world.size, world.rank)
    for name, value, least in (("expert_alignment", alignment, 1), ("num_worst_tokens", worst, 0)):
        check_int(op, name, value, least, world.rank)
    if topk_idx is None:
        if topk_weights is not None:
            refuse(op, "topk_weights is given; expected topk_idx with it", world.rank)
        k = min(world.size, 32)
        if not capturing() and len(in_rank) and int(in_rank.sum(1).max()) > k:
            refuse(
                op,
                f"topk_idx is None; expected topk_idx, because a token goes to more than {k} ranks",
                world.rank,
            )
        # The ranks of each token. The first expert of a rank represents it.
        order = in_rank.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :k]
        return (
            payload,
            torch.where(in_rank.gather(1, order), order * (experts // world.size), -1),
            None,
            per_expert.to("cpu", torch.int64),
        )
    ids, weights = check_picks(op, topk_idx, topk_weights, payload.tokens, experts, world.rank)
    if not capturing() and not torch.equal(layout_of(ids, experts, world.size)[1], in_rank):
        refuse(
            op,
            "is_token_in_rank does not match topk_idx; expected the result of get_dispatch_layout for the same ids",
            world.rank,
        )
    return payload, ids, weights, None


def routing_of(op: str, handle: Any, world: Any) -> Any:
    """The Routing of a handle. Refuses handles of other groups."""
    if not isinstance(handle, DispatchHandle):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch of this library",
            world.rank,
        )
    if handle.routing.world is not world:
        refuse(op, "handle is from a Buffer of another group; expected a handle of this group", world.rank)
    return handle.routing
