"""Types of the module."""

import torch

from ..shared.status import Failure
from .block import Block
from .replica_request import ReplicaRequest
from .communicator import Communicator
from .first_phase import FirstPhase
from .plan import Plan
from .recording import Recording

class Buffer:
    comm: Communicator
    def __init__(
        self,
        comm: Communicator,
        hidden,
        dtype,
        num_experts,
        top_k,
        max_tokens,
        channels,
        arena_bytes,
        check: bool,
        logical_experts: int = ...,
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
        plan: Plan | None = ...,
        scale_kind: int = ...,
        scales_by_column: bool = ...,
        request: ReplicaRequest | None = ...,
        routing: int = ...,
        first: FirstPhase | None = ...,
    ) -> tuple[Plan, Block, Block] | Failure: ...
    def choose(self, ids: int, tokens: int, request: ReplicaRequest) -> Failure | None: ...
    def combine(
        self,
        rows: int,
        weights: int,
        y: int,
        bias: int,
        bias_stride: int,
        plan: Plan,
        output: Block,
        back: int = ...,
        slots: int = ...,
        wire: int = ...,
        sums_back: bool = ...,
    ) -> Failure | None: ...
    def owns(self, plan: Plan) -> bool: ...
    def block_layout(
        self, plan: Plan, rows: int, row_bytes: int, scale_bytes: int, scales_by_column: bool = ...
    ) -> tuple[int, ...]: ...
    def window(self) -> tuple[int, int]: ...
    def arena(self) -> tuple[int, int, int]: ...
    def counters(self) -> tuple[int, ...]: ...
    def take_counters(self) -> dict: ...
    def trace(self, on: bool) -> None: ...
    def record(self, recording: Recording | None) -> None: ...
    def take(self, recording: Recording) -> tuple: ...
    def take_timeline(self) -> list: ...
    def rail_is_mapped(self) -> bool: ...
    def set_stream_threshold(self, bytes: int) -> None: ...
    def set_fault(self, point: str, action: str, passes: int = ..., phase: str = ...) -> None: ...
    def refuse(self, verb: str, epoch: int, why: int) -> Failure | None: ...
    def try_dispatch(
        self, x, topk_ids, topk_weights, layout, alignment
    ) -> tuple[Plan, Block, Block, int, torch.Tensor | None, torch.Tensor | None] | Failure | None: ...
    def try_combine(
        self, rows, plan: Plan, output: Block, num_rows: int, num_tokens: int, topk_weights, out
    ) -> torch.Tensor | Failure | None: ...

def buffer_bytes(
    rank,
    size,
    ranks_per_node,
    hidden,
    dtype,
    num_experts,
    top_k,
    max_tokens,
    channels,
    arena_bytes,
    logical_experts: int = ...,
) -> int: ...
