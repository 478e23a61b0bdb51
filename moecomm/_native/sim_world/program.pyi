"""Types of the module."""

from typing import Any

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
    def decode_mask(self, size: int, ranks: list[int]) -> None: ...
    def leave_out(self, ranks: list[int]) -> None: ...
    def refuse(self, ranks: list[int], strays: bool) -> None: ...
    def __len__(self) -> int: ...
