"""Parts of Buffer: its runtime and handle, the layout of a routing, and what dispatch is called with."""

from __future__ import annotations

import torch

from ._checks import IDS, capturing, check_experts, check_int, check_picks
from ._routing import Payload
from .errors import refuse, require_tensor
from .handles import DispatchHandle


def layout_of(ids, experts, ranks):
    """(picks per expert int32 [experts], which ranks get the token bool [T, ranks]) of ids in range."""
    flat = ids.to(torch.int64)
    per_expert = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
    per_expert.index_add_(
        0, (flat + 1).view(-1), torch.ones(flat.numel(), dtype=torch.int32, device=ids.device)
    )
    in_rank = torch.zeros((len(ids), ranks + 1), dtype=torch.bool, device=ids.device)
    in_rank.scatter_(1, torch.div(flat, experts // ranks, rounding_mode="floor") + 1, True)
    return per_expert[1:], in_rank[:, 1:].contiguous()


def check_dispatch(world, x, per_rank, in_rank, per_expert, topk_idx, topk_weights, alignment, worst):
    """(Payload, ids [T, K], weights or None, what the caller counted per expert)."""
    op = "dispatch"
    payload = Payload(op, x)
    for name, value, kinds, shape in (
        ("num_tokens_per_rank", per_rank, IDS, (world.size,)),
        ("num_tokens_per_expert", per_expert, IDS, (None,)),
        ("is_token_in_rank", in_rank, (torch.bool,), (payload.tokens, world.size)),
    ):
        if value is None:
            refuse(op, f"{name} is None; expected it from get_dispatch_layout, or a handle", world.rank)
        require_tensor(op, name, value, dtypes=kinds, shape=shape)
    experts = per_expert.numel()
    check_experts(op, experts, world.size, world.rank)
    for name, value, least in (("expert_alignment", alignment, 1), ("num_worst_tokens", worst, 0)):
        check_int(op, name, value, least, world.rank)
    if topk_idx is None:
        if topk_weights is not None:
            refuse(op, "topk_weights is given without topk_idx; expected both", world.rank)
        k = min(world.size, 32)
        if not capturing() and len(in_rank) and int(in_rank.sum(1).max()) > k:
            refuse(
                op,
                f"topk_idx is None and a token goes to more than {k} ranks; expected topk_idx",
                world.rank,
            )
        order = in_rank.to(torch.int8).argsort(dim=1, descending=True, stable=True)[
            :, :k
        ]  # the ranks of each token: their first experts stand for them
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
            "is_token_in_rank is not the layout of topk_idx; expected what get_dispatch_layout gives for the same ids",
            world.rank,
        )
    return payload, ids, weights, None


def routing_of(op, handle, world):
    """The Routing of a handle that comes from this group."""
    if not isinstance(handle, DispatchHandle):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch of this library",
            world.rank,
        )
    if handle._routing.world is not world:
        refuse(op, "handle comes from a Buffer of another group; expected one of this group", world.rank)
    return handle._routing
