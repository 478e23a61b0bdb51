"""Types of the module."""

from ..shared.status import Failure
from .block import Block
from .calls import Calls
from .counts import Counts
from .plan import Plan
from .peer_access import PeerAccess

class Buffer:
    def __init__(
        self,
        geometry,
        peer_access: PeerAccess,
        calls: Calls,
        device: int,
        hidden,
        dtype,
        num_experts,
        top_k,
        max_tokens,
        channels,
        chunk_bytes,
        arena_bytes,
        check: bool,
        spread,
        stages: int,
        timeout: float,
    ) -> None: ...
    def contact(self) -> bytes: ...
    def connect(self, contacts: list) -> None: ...
    def finish_connect(self) -> None: ...
    def release(self) -> None: ...
    def dispatch(
        self,
        x: int,
        scales: int,
        ids: int,
        ids_are_int32: bool,
        weights: int,
        tokens: int,
        by_rank: bool,
        alignment: int,
        capacity: int,
        row_bytes: int,
        scale_bytes: int,
        plan: Plan,
        scale_kind: int,
        scales_by_column: bool,
        routing: int,
        stream: int,
    ) -> tuple[Plan, Block, Block] | Failure: ...
    def combine(
        self,
        rows: int,
        weights: int,
        y: int,
        bias: int,
        bias_stride: int,
        plan: Plan,
        output: Block,
        back: int,
        slots: int,
        wire: int,
        sums_back: bool,
        stream: int,
    ) -> Failure | None: ...
    def refuse(self, verb: str, why: int, stream: int) -> Failure | None: ...
    def fault(self) -> Failure | None: ...
    def ended(self) -> Failure | None: ...
    def owns(self, plan: Plan) -> bool: ...
    def block_layout(
        self, plan: Plan, rows: int, row_bytes: int, scale_bytes: int, scales_by_column: bool = ...
    ) -> tuple[int, ...]: ...
    def window(self) -> tuple[int, int]: ...
    def arena(self) -> tuple[int, int, int]: ...
    def captured_bytes(self) -> int: ...
    def release_captured(self) -> None: ...
    def counters(self) -> Counts: ...
    def take_counters(self) -> dict: ...

def device_limits() -> tuple[int, int]: ...
def shared_bytes(spread, stages: int = ...) -> int: ...
