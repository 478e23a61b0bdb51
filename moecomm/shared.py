"""Copies of objects that own shared resources."""

from __future__ import annotations

from typing import Any, NoReturn


class Shared:
    """Base class of owners of windows, connections and peers. A copy is the same object, and pickling is refused."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled; save a layer's state_dict instead"
        )
