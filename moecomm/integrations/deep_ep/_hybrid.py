"""Parts of HybridEPBuffer: the common begin of its calls, and its handles."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import capturing, check_int
from ._routing import Payload, Routing
from ._reporting import Reporting
from .errors import Unsupported, refuse, require_tensor
from .handles import Opaque
from .maps import indices_to_map


def begin(
    op: str,
    world: Any,
    config: Any,
    hidden: int,
    scaling_factor: Any,
    topk_idx: Any,
    topk_weights: Any,
    num_of_experts: Any,
    experts_per_rank: Any,
    probs: Any,
    routing_map: Any,
    handle: Any,
    same: Any,
    how: Any,
) -> Any:
    """Begin a dispatch: (Routing, Payload, weights [T, K] or None).

    Without a handle all ranks check their arguments and agree on the maximum number of tokens and of picks per token.
    """
    world.require_open(op)
    refusal, routing, most = None, None, (0, 1)
    try:
        payload = Payload(op, hidden if scaling_factor is None else (hidden, scaling_factor))
        if handle is not None:
            routing = state_of(op, handle, "expert" if same["permuted"] else "rank", world)[0]
            if any(value is not None for value in (topk_idx, topk_weights, routing_map, probs)):
                refuse(
                    op,
                    "topk_idx, topk_weights, routing_map or probs are given; expected None, because a handle is given",
                    world.rank,
                )
            if payload.tokens != routing.tokens:
                refuse(
                    op,
                    f"hidden has {payload.tokens} tokens; expected {routing.tokens} as in the handle",
                    world.rank,
                )
            return routing, payload, None
        local = config.num_of_experts_per_rank if experts_per_rank is None else experts_per_rank
        check_int(op, "num_of_experts_per_rank", local, 1, world.rank)
        experts = local * world.size
        if num_of_experts is not None and num_of_experts != experts:
            refuse(
                op,
                f"num_of_experts is {num_of_experts}; expected {experts}, {local} experts per rank times "
                f"{world.size} ranks",
                world.rank,
            )
        if capturing():
            raise Unsupported(
                f"{op}: a CUDA graph is being captured, and the host cannot read the numbers of picks and rows; "
                "dispatch once before the capture and use its handle inside, or use "
                "ElasticBuffer.dispatch(do_cpu_sync=False)",
                op=op,
                rank=world.rank,
            )
        if (topk_idx is None) == (routing_map is None):
            refuse(
                op,
                "topk_idx and routing_map are both None or both given; expected exactly one of them, or a handle",
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
            with Reporting(world, "dispatch") as reporting:
                if routing is not None:
                    reporting.at(*routing.first)
                raise
        refusal = error
    most, k = world.agree(op, same=same, most=most, refusal=refusal)
    # As in hybrid-ep, the configuration grows with the calls.
    config.hidden_dim, config.max_num_of_tokens_per_rank = (
        max(config.hidden_dim, payload.width),
        max(config.max_num_of_tokens_per_rank, most),
    )
    # The experts of each token, in ascending order.
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :k]
    picked = chosen.gather(1, order)
    weights = None if probs is None else probs.gather(1, order) * picked
    return Routing(world, torch.where(picked, order, -1), experts, most, 20, call), payload, weights


def state_of(op: str, handle: Any, layout: str, world: Any) -> Any:
    """(Routing, number of rows requested or None) of a handle, or of a tuple with its items."""
    if (
        not isinstance(handle, (tuple, list))
        or not handle
        or not isinstance(handle[0], Opaque)
        or handle[0].state is None
    ):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch of this library",
            world.rank,
        )
    routing, budget = handle[0].state
    if routing.world is not world or routing.how["layout"] != layout:
        refuse(
            op,
            "handle is from another group or from the other dispatch method; expected the handle of the matching "
            "dispatch of this group",
            world.rank,
        )
    return routing, budget


def check_kept(op: str, world: Any, handle: Any, pad_multiple: Any, num_permuted_tokens: Any) -> Any:
    """Check that what is given beside a handle is as in the handle: the number of rows requested, or None."""
    routing, budget = state_of(op, handle, "expert", world)
    with Reporting(world, "dispatch") as reporting:
        reporting.at(*routing.first)
        for name, given, kept in (
            ("pad_multiple", pad_multiple, routing.how["expert_alignment"]),
            ("num_permuted_tokens", num_permuted_tokens, rows_of(routing, budget)),
        ):
            if given is not None and given != kept:
                refuse(op, f"{name} is {given}; expected None, or {kept} as in the handle", world.rank)
    return budget


def rows_of(routing: Any, budget: Any) -> Any:
    """Number of rows in the caller's tensors."""
    return routing.num_rows if budget is None else budget


def received(payload: Any, out: Any) -> Any:
    """(rows, scales or None) that a dispatch returned."""
    got = payload.received(out)
    return got if isinstance(got, tuple) else (got, None)


def fit(t: Any, rows: Any) -> Any:
    """The first rows of a tensor, padded with zeros."""
    if len(t) >= rows:
        return t[:rows]
    return torch.cat([t, torch.zeros((rows - len(t), *t.shape[1:]), dtype=t.dtype, device=t.device)])
