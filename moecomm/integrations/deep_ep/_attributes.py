"""What mixins of Buffer expect of it, for type checkers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OfBuffer:
    """Attributes of Buffer."""

    world: Any
    rank: int
    group_size: int
    num_sms: int
    enable_shrink: bool
    low_latency_mode: bool
    _require_usable: Callable[[str], Any]
