"""Parts of ElasticBuffer: argument checks, reuse of a handle, and methods that are not supported."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import check_experts, check_int, check_picks
from ._routing import Routing
from ._sizes import rows_for
from .errors import Unsupported, refuse, require_tensor
from .events import wait_before
from .handles import EPHandle

_ENGRAM = "moecomm has no Engram memory; use an embedding of the application"
_PIPELINE = "moecomm has no pipeline transfers; use torch.distributed.isend and irecv"
_GATHER = "moecomm has no all-gather or reduce-scatter; use those of torch.distributed"
UNSUPPORTED = {  # methods of deep_ep's ElasticBuffer that are not supported: {name: reason}
    "engram_write": _ENGRAM,
    "engram_fetch": _ENGRAM,
    "pp_set_config": _PIPELINE,
    "pp_send": _PIPELINE,
    "pp_recv": _PIPELINE,
    "agrs_set_config": _GATHER,
    "agrs_get_inplace_tensor": _GATHER,
    "create_agrs_session": _GATHER,
    "destroy_agrs_session": _GATHER,
    "all_gather": _GATHER,
}


def routing_of(op: str, handle: Any, world: Any) -> Any:
    """The Routing of an EPHandle. Refuses handles of other groups."""
    if not isinstance(handle, EPHandle):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the EPHandle of a dispatch",
            world.rank,
        )
    if handle.routing.world is not world:
        refuse(op, "handle is from a buffer of another group; expected a handle of this group", world.rank)
    return handle.routing


def check_new(
    op: str,
    world: Any,
    payload: Any,
    topk_idx: Any,
    topk_weights: Any,
    num_experts: Any,
    alignment: Any,
    most: Any,
    do_expand: Any,
    sync: Any,
) -> Any:
    """Check a dispatch without a handle: (ids, weights or None, {name: value that must be equal on all ranks})."""
    check_int(op, "expert_alignment", alignment, 1, world.rank)
    if num_experts is None or topk_idx is None:
        missing = "num_experts" if num_experts is None else "topk_idx"
        refuse(op, f"{missing} is None; expected a value, or a handle", world.rank)
    check_experts(op, num_experts, world.size, world.rank)
    ids, weights = check_picks(op, topk_idx, topk_weights, payload.tokens, num_experts, world.rank)
    if not sync and not most:
        refuse(
            op,
            "num_max_tokens_per_rank is 0; expected a positive number here or in ElasticBuffer(...), because "
            "do_cpu_sync is False",
            world.rank,
        )
    same = {
        **payload.same,
        "num_experts": num_experts,
        "top_k": ids.shape[1],
        "num_max_tokens_per_rank": most,
        "expert_alignment": alignment,
        "do_expand": bool(do_expand),
        "do_cpu_sync": sync,
        "topk_weights given": weights is not None,
    }
    return ids, weights, same


def new_routing(
    world: Any, ids: Any, num_experts: Any, most: Any, alignment: Any, do_expand: Any, sync: Any
) -> Any:
    """Make the Routing of a dispatch without a handle."""
    local = num_experts // world.size
    rows = None if sync else rows_for(world.size, most, ids.shape[1], local, alignment, do_expand)
    layout = "expert" if do_expand else "rank"
    how = dict(layout=layout, expert_alignment=alignment if do_expand else 1, capacity=rows)
    return Routing(world, ids, num_experts, most, 20, how)


def wait_for_events(op: str, rank: int, event: Any, before_epilogue: Any, on_comm_stream: Any) -> None:
    """Let the current stream wait for previous_event and previous_event_before_epilogue."""
    if event is not None and not on_comm_stream:
        refuse(op, "previous_event is given; expected allocate_on_comm_stream=True with it", rank)
    names = "previous_event", "async_with_compute_stream"
    wait_before(op, event, True, False, names)
    wait_before(op, before_epilogue, True, False, ("previous_event_before_epilogue", names[1]))


def check_again(
    op: str,
    world: Any,
    payload: Any,
    handle: Any,
    topk_idx: Any,
    topk_weights: Any,
    num_experts: Any,
    alignment: Any,
    expand: Any,
) -> Any:
    """Check a dispatch with a handle: (Routing, weights [T, K] or None)."""
    routing = routing_of(op, handle, world)
    if topk_idx is not None:
        refuse(op, "topk_idx is given; expected None, because a handle is given", world.rank)
    for name, given, kept in (
        ("num_experts", num_experts, handle.num_experts),
        ("expert_alignment", alignment, handle.expert_alignment),
        ("do_expand", expand or None, handle.do_expand),
    ):
        if given is not None and given != kept:
            refuse(op, f"{name} is {given}; expected None, or {kept} as in the handle", world.rank)
    if payload.tokens != routing.tokens:
        refuse(op, f"x has {payload.tokens} tokens; expected {routing.tokens} as in the handle", world.rank)
    return routing, require_tensor(
        op,
        "topk_weights",
        topk_weights,
        optional=True,
        dtypes=(torch.float32,),
        shape=tuple(routing.ids.shape),
    )


def unsupported(name: str, why: str) -> Any:
    def verb(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(f"{name}: {why}", op=name, rank=self.rank_idx)

    verb.__name__, verb.__doc__ = name, f"Not supported: {why}."
    return verb


def by_column(scales: Any) -> Any:
    """Copy to column-major order, with every column starting at a multiple of 16 bytes."""
    step = -(-len(scales) * scales.itemsize // 16) * 16 // scales.itemsize
    made = torch.zeros((scales.shape[1], step), dtype=scales.dtype, device=scales.device).t()[: len(scales)]
    return made.copy_(scales)
