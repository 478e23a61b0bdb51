"""Parts of ElasticBuffer: its handle, how it is used again, and the methods that are not there."""

from __future__ import annotations

import torch

from ._checks import check_experts, check_int, check_picks
from ._routing import Routing
from ._sizes import rows_for
from .errors import Unsupported, refuse, require_tensor
from .events import wait_before
from .handles import EPHandle

_ENGRAM = "Engram's memory is no part of moecomm; expected an embedding of your own"
_PIPELINE = "moecomm has no pipeline transfers; expected torch.distributed.isend and irecv"
_GATHER = "moecomm has no all-gather or reduce-scatter; expected torch.distributed's"
UNSUPPORTED = {  # methods of deep_ep's ElasticBuffer: why they are not there
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


def routing_of(op, handle, world):
    """The Routing of an EPHandle that comes from this group."""
    if not isinstance(handle, EPHandle):
        refuse(
            op,
            f"handle is a {type(handle).__qualname__}; expected the EPHandle of a dispatch",
            world.rank,
        )
    if handle._routing.world is not world:
        refuse(op, "handle comes from a buffer of another group; expected one of this group", world.rank)
    return handle._routing


def check_new(op, world, payload, topk_idx, topk_weights, num_experts, alignment, most, do_expand, sync):
    """(ids, weights or None, what must be equal on all ranks) of a dispatch without a handle."""
    check_int(op, "expert_alignment", alignment, 1, world.rank)
    if num_experts is None or topk_idx is None:
        missing = "num_experts" if num_experts is None else "topk_idx"
        refuse(op, f"{missing} is None; expected it, or a handle", world.rank)
    check_experts(op, num_experts, world.size, world.rank)
    ids, weights = check_picks(op, topk_idx, topk_weights, payload.tokens, num_experts, world.rank)
    if not sync and not most:
        refuse(
            op,
            "do_cpu_sync is False and num_max_tokens_per_rank is 0; expected it here or in ElasticBuffer(...)",
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


def new_routing(world, ids, num_experts, most, alignment, do_expand, sync):
    """The Routing of a dispatch without a handle."""
    local = num_experts // world.size
    rows = None if sync else rows_for(world.size, most, ids.shape[1], local, alignment, do_expand)
    layout = "expert" if do_expand else "rank"
    how = dict(layout=layout, expert_alignment=alignment if do_expand else 1, capacity=rows)
    return Routing(world, ids, num_experts, most, 20, how)


def wait_for_events(op, rank, event, before_epilogue, on_comm_stream):
    """Wait for what previous_event and previous_event_before_epilogue stand for."""
    if event is not None and not on_comm_stream:
        refuse(op, "previous_event is given without allocate_on_comm_stream; expected both", rank)
    names = "previous_event", "async_with_compute_stream"
    wait_before(op, event, True, False, names)
    wait_before(op, before_epilogue, True, False, ("previous_event_before_epilogue", names[1]))


def check_again(op, world, payload, handle, topk_idx, topk_weights, num_experts, alignment, expand):
    """(Routing, weights [T, K] or None) of a dispatch by a handle."""
    routing = routing_of(op, handle, world)
    if topk_idx is not None:
        refuse(op, "topk_idx is given with a handle; expected None", world.rank)
    for name, given, kept in (
        ("num_experts", num_experts, handle.num_experts),
        ("expert_alignment", alignment, handle.expert_alignment),
        ("do_expand", expand or None, handle.do_expand),
    ):
        if given is not None and given != kept:
            refuse(op, f"{name} is {given} and the handle's is {kept}; expected it left out", world.rank)
    if payload.tokens != routing.tokens:
        refuse(op, f"x has {payload.tokens} tokens; the handle is for {routing.tokens}", world.rank)
    return routing, require_tensor(
        op,
        "topk_weights",
        topk_weights,
        optional=True,
        dtypes=(torch.float32,),
        shape=tuple(routing.ids.shape),
    )


def unsupported(name, why):
    def verb(self, *args, **kwargs):
        raise Unsupported(f"{name}: {why}", op=name, rank=self.rank_idx)

    verb.__name__, verb.__doc__ = name, f"Not there: {why}."
    return verb


def by_column(scales):
    """The same values, column-major, each column starting on 16 bytes."""
    step = -(-len(scales) * scales.itemsize // 16) * 16 // scales.itemsize
    made = torch.zeros((scales.shape[1], step), dtype=scales.dtype, device=scales.device).t()[: len(scales)]
    return made.copy_(scales)
