"""Verdict: the result of an agreement."""

from __future__ import annotations

from typing import Any

from dataclasses import dataclass

from ..errors import InvalidArgument


@dataclass(frozen=True)
class Verdict:
    """The result of an agreement, equal on all survivors.

    .generation: number of the generation that ends, from 0. .survivors, .lost: its ranks, ascending. .completed: number
    of collective calls (dispatch, combine and others, in order) of this generation that are complete on every survivor.
    .begun: the largest number of calls that a survivor has begun. Calls between these two numbers may be complete on
    some survivors. .steps: as .completed, for the steps of all generations.
    """

    generation: int
    survivors: tuple[int, ...]
    lost: tuple[int, ...]
    completed: int
    begun: int
    steps: int


def verdict_of(reports: dict[int, Any], size: int) -> Verdict:
    """Return the Verdict from the reports of the survivors."""
    generations, completed, begun, steps = zip(*(report[:4] for report in reports.values()), strict=True)
    lost = tuple(r for r in range(size) if r not in reports)
    return Verdict(max(generations), tuple(reports), lost, min(completed), max(begun), min(steps))


def require_generation(comm: Any, op: str, what: str, made_with: Any) -> None:
    """Refuse an object of a generation that has ended. made_with: the native communicator of its generation, or None.

    Raises
    ------
    InvalidArgument
    """
    if comm.generation and made_with not in (None, comm.native):
        raise InvalidArgument(
            f"{op}: {what} belongs to a generation that has ended; expected one of the present generation "
            f"{comm.generation}; repeat the step",
            op=op,
            rank=comm.rank,
            expected=comm.generation,
        )
