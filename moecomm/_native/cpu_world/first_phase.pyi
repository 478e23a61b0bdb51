"""Types of the module."""

from collections.abc import Callable
from typing import Any

class FirstPhase:
    make: Callable[..., Any] | None
    def __init__(self) -> None: ...
    def end(self) -> None: ...
    def wait(self, milliseconds: int) -> tuple[Any, ...] | bool: ...
