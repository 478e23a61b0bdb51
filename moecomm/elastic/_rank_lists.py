"""Lists of ranks that a caller gives to a collective call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..checks import in_words
from ..errors import InvalidArgument
from ..shapes import as_int


def ranks_of(
    comm: Any, op: str, name: str, given: Iterable[int], fits: Callable[[list[int]], bool], expected: str
) -> list[int]:
    """Return the ranks of an argument as a list of ints. fits: a condition of the call, for valid ranks.

    Raises
    ------
    InvalidArgument
        It is no list of ranks of comm, or does not fit. Ranks with a valid list wait for this rank: they get the
        same error.
    """
    said: Any = given
    try:
        ranks: list[Any] = [as_int(r) for r in given]
        said = ranks or given
        good = all(isinstance(r, int) and 0 <= r < comm.size for r in ranks) and fits(ranks)
    except TypeError:
        ranks, good = [], False
    if not good:
        why = f"{op}: {name} is {in_words(said)}; expected {expected}"
        comm.bootstrap.refuse(range(comm.size), why)
        raise InvalidArgument(why, op=op, rank=comm.rank)
    return ranks
