"""Member: the members of a Communicator, subsets of them, and agreement on the survivors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidArgument
from ._rank_lists import ranks_of
from .verdict import Verdict, verdict_of

if TYPE_CHECKING:
    from ..communicator import Communicator


def largest_nodes(nodes: list[int]) -> int:
    """Return the largest ranks_per_node whose nodes each lie in one old node. nodes: the old node of each rank."""
    return max(
        n
        for n in range(1, len(nodes) + 1)
        if len(nodes) % n == 0 and all(len(set(nodes[i : i + n])) == 1 for i in range(0, len(nodes), n))
    )


class Member:
    """The part of Communicator that makes communicators of its members and agrees on the survivors."""

    generation = 0  # number of changes of the members
    _steps = 0  # number of steps that are complete here

    # Attributes of Communicator.
    rank: int
    size: int
    ranks_per_node: int
    timeout: float
    patience: str
    device: torch.device
    bootstrap: Any
    native: Any
    gpu: int | None
    order: Any
    collective: Any
    _rail_between_nodes: Any
    _use: Any

    def duplicate(self) -> Communicator:
        """Return another communicator of the same ranks. Its calls are independent of this one's order. Collective.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not make the call within the timeout, or has ended.
        """
        self.order.require_open("duplicate")
        return self._of(range(self.size), self.ranks_per_node)

    def shrink(self, alive: Iterable[int]) -> Communicator:
        """Return a communicator of some ranks, renumbered in the same order. Collective over these ranks only.

        This communicator may be broken. The new nodes have one size, the largest with which each lies in one old node.
        If a node has lost a rank, each of its other ranks may become a node.

        Parameters
        ----------
        alive : iterable of int
            Ranks of this communicator, the same on all of them, including the caller. agree() finds them.

        Raises
        ------
        InvalidArgument
            alive has ranks that do not exist, or does not have this rank.
        PeerTimeout, PeerLost
            One of these ranks does not make the call within the timeout, or has ended.
        """
        self.order.require_open("shrink")
        expected = f"ranks in 0..{self.size - 1}, including {self.rank}"
        left = ranks_of(self, "shrink", "alive", alive, lambda ranks: self.rank in ranks, expected)
        ranks = sorted(set(left))
        return self._of(ranks, largest_nodes([r // self.ranks_per_node for r in ranks]))

    def _of(self, ranks: Iterable[int], per_node: int) -> Communicator:
        return type(self)(  # type: ignore[call-arg,return-value]
            self.bootstrap.subset(ranks),
            ranks_per_node=per_node,
            device=self.device if self.gpu is None else torch.device("cuda", self.gpu),
            timeout=self.timeout,
            patience=self.patience,
        )

    # -- agreement --------------------------------------------------------------------------------

    def agree(self, *, minority: bool = False, timeout: float | None = None) -> Verdict:
        """Agree on the survivors and on the calls that are complete. Return the Verdict, equal on all survivors.

        Collective over the survivors. The communicator may be broken. Further ranks, including rank 0, may end during
        the agreement: the others still reach one verdict. A rank is not a survivor if another survivor has lost it, or
        if it does not respond within the timeout. docs/elastic.md has the guarantees and their limits.

        Parameters
        ----------
        minority : bool
            True: go on even if a larger number of ranks may still run elsewhere. Then both parts may go on.
        timeout : float, optional
            Seconds without a message after which a rank counts as lost. None: that of the communicator.

        Raises
        ------
        NoMajority
            Unreachable ranks may still run, and this rank does not reach more than half of all ranks.
        Excluded
            The other ranks go on without this one.
        InvalidArgument
            Ranks are threads of one process, or there are more than 128.
        """
        self._require_agreeing("agree")
        self._leave_calls()
        return verdict_of(self.bootstrap.agree(self._report(), minority=minority, timeout=timeout), self.size)

    def _require_agreeing(self, op: str) -> None:
        self.order.require_open(op)
        if self.bootstrap.threads:
            raise InvalidArgument(
                f"{op}: ranks are threads of one process, which end together; expected ranks that are processes",
                op=op,
                rank=self.rank,
            )
        self.order.settle()

    def _leave_calls(self) -> None:
        """After a failed exchange, end the waits of ranks that have completed it and wait in a later call."""
        if self.bootstrap.is_broken() and self.native.broken() is None:
            lost = self.bootstrap.a_lost_rank()
            self.native.leave_calls(self.rank if lost is None else lost)

    def _report(self) -> list[Any]:
        begun = self.native.calls_begun()
        return [
            self.generation,
            begun - (self.native.broken() is not None),
            begun,
            self._steps,
            self._living(),
            self._ready_for(),
        ]

    def _living(self) -> list[Any]:
        return []

    def _ready_for(self) -> Any:
        return None

    def _end_growth(self) -> None:
        """Called when the communicator is closed."""
