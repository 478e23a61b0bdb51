"""Types of the sim world's extension module; moecomm.sim documents and validates."""

from typing import Any

PHASES: tuple[str, ...]
FLAWS: tuple[str, ...]

class Program:
    def dispatch(
        self,
        handle: int,
        parts: list[tuple[int, int, int, int, int]],
        by_rank: bool,
        alignment: int,
        capacity: int,
        row_bytes: int,
        scale_bytes: int,
        kind: int,
        scales_given: bool,
        before: float,
        keep: Any = None,
    ) -> None: ...
    def choose(
        self, mode: int, activate: int, parts: list[tuple[int, int, int]], alone: bool, keep: Any = None
    ) -> None: ...
    def combine(
        self,
        handle: int,
        parts: list[tuple[int, int, int, int, int]],
        keep_rows: bool,
        flip: int,
        wire: int,
        echo_weights: bool,
        before: float,
        keep: Any = None,
    ) -> None: ...
    def decode_dispatch(
        self,
        parts: list[tuple[int, int, int, int, int]],
        row_bytes: int,
        scale_bytes: int,
        kind: int,
        scales_given: bool,
        before: float,
        keep: Any = None,
    ) -> None: ...
    def decode_combine(
        self,
        parts: list[tuple[int, int, int]],
        earlier: bool,
        flip: int,
        wire: int,
        before: float,
        keep: Any = None,
    ) -> None: ...
    def decode_hook(self, size: int, after_combine: bool, earlier: bool = False) -> None: ...
    def refuse(self, ranks: list[int], strays: bool) -> None: ...
    def __len__(self) -> int: ...

class Cluster:
    def __init__(
        self,
        size: int,
        ranks_per_node: int,
        num_sms: int,
        hidden: int,
        dtype: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        channels: int,
        arena_bytes: int,
        payload: bool,
        decode: bool,
        schedule: int,
        workers: int,
        hardware: dict[str, float],
        placement: list[int],
        logical_experts: int,
    ) -> None: ...
    def reset(self, seed: int | None = None, lead: float = 0, budget: int = ...) -> None: ...
    def run(self, program: Program, times: Any) -> list[tuple[int, int, str, str, int, int, int]]: ...
    def plan(self, rank: int, handle: int) -> tuple[list[int], list[int]]: ...
    def block(self, rank: int, handle: int) -> tuple[int, int, tuple[int, int, int, int, int]]: ...
    def packed(self, rank: int) -> tuple[int, int, int, list[int], int]: ...
    def counters(self, rank: int) -> dict[str, Any]: ...
    def links(self, rank: int) -> dict[str, Any]: ...
    def set_log(self, on: bool) -> None: ...
    def log(self) -> list[dict[str, Any]]: ...
    def stuck(self) -> list[dict[str, Any]]: ...
    @property
    def switches(self) -> int: ...
    def explore(
        self, program: Program, flaw: str, phase: str, chosen: bool, first_seed: int, count: int
    ) -> dict[str, Any]: ...
