"""Conversion of picks to dense maps."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import IDS, check_int
from .errors import refuse, require_tensor


def indices_to_map(topk_idx: Any, topk_weights: Any, num_of_tokens: Any, num_of_experts: Any) -> Any:
    """Convert picks to dense maps: bool [T, E], and float32 [T, E] or None without weights. -1 is no pick.

    Raises
    ------
    InvalidArgument
        An argument is wrong, or an id is out of range.
    """
    op = "indices_to_map"
    check_int(op, "num_of_tokens", num_of_tokens, 0)
    check_int(op, "num_of_experts", num_of_experts, 1)
    ids = require_tensor(op, "topk_idx", topk_idx, dtypes=IDS, shape=(num_of_tokens, None)).to(torch.int64)
    weights = require_tensor(op, "topk_weights", topk_weights, optional=True, shape=tuple(ids.shape))
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < num_of_experts:
        refuse(
            op,
            f"topk_idx contains ids from {int(ids.min())} to {int(ids.max())}; expected -1 (no expert) or ids "
            f"below num_of_experts = {num_of_experts}",
        )
    routing_map = (
        torch.zeros((num_of_tokens, num_of_experts + 1), dtype=torch.bool, device=ids.device)
        .scatter_(1, ids + 1, True)[:, 1:]
        .contiguous()
    )
    if weights is None:
        return routing_map, None
    probs = torch.zeros((num_of_tokens, num_of_experts + 1), dtype=torch.float32, device=ids.device).scatter_(
        1, ids + 1, weights.float()
    )
    return routing_map, probs[:, 1:].contiguous()
