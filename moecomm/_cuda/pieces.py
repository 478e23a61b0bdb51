"""A piece of a block on a GPU, as an object that libraries of arrays accept."""

from __future__ import annotations

from typing import Any


class Piece:
    """A range of bytes of a block, which it keeps alive. Compilers expect a tensor at the beginning of its storage."""

    def __init__(self, block: Any, offset: int, count: Any) -> None:
        self._block, whole = block, block.__cuda_array_interface__
        self.__cuda_array_interface__ = {
            **whole,
            "shape": (count,),
            "data": (whole["data"][0] + offset, False),
        }
