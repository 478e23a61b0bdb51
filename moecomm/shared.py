"""What copies of objects that stand for shared resources are."""

from __future__ import annotations


class Shared:
    """One of these stands for windows, connections and peers: a copy is the same object, and none leaves its process."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be pickled; save a layer's state_dict instead"
        )
