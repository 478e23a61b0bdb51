"""Health: the times that a rank has waited for each peer, and the peers that are slow. A slow peer is not lost."""

from __future__ import annotations

from typing import Any

import os
import time
from dataclasses import dataclass

import torch

from .growing import Growing


@dataclass(frozen=True)
class PeerHealth:
    """What this rank knows about a peer in this generation.

    .rank: the peer. .waits: number of waits for it, without very short ones. .waited: seconds of these waits. .quiet:
    seconds since the last data of the peer for which this rank waited, or None. .state: "ok"; "slow": this rank has
    waited for it for more than slow_after seconds; "lost". .phase: phase of the call in which this rank waits for it
    now, or None.
    """

    rank: int
    waits: int
    waited: float
    quiet: float | None
    state: str
    phase: str | None


@dataclass(frozen=True)
class Health:
    """What a rank knows about its peers.

    .rank: this rank. .peers: a PeerHealth for every other rank. .waiting_for: the rank for which it waits now, or None.
    .waiting: seconds of this wait so far.
    """

    rank: int
    peers: tuple[PeerHealth, ...]
    waiting_for: int | None
    waiting: float

    @property
    def slow(self) -> tuple[int, ...]:
        """The peers that are slow."""
        return tuple(p.rank for p in self.peers if p.state == "slow")


def draw_waits(matrix: torch.Tensor, path: str | os.PathLike[str]) -> None:
    """Write an image of a matrix of waits (Communicator.wait_matrix). Needs matplotlib.

    Parameters
    ----------
    matrix : Tensor [size, size]
        Seconds; row r waits for column c.
    path : path-like
        The image. Its suffix selects the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    image = axes.imshow(matrix.numpy(), cmap="magma")
    axes.set_xlabel("for rank")
    axes.set_ylabel("rank waits")
    figure.colorbar(image, label="seconds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


class Healthy(Growing):
    """The part of Communicator that reports the state of its peers."""

    def health(self, *, slow_after: float = 1.0) -> Health:
        """Return the state of the peers as this rank sees it. Local; from any thread, also during calls. Empty on GPUs.

        A peer is slow while this rank has waited for it for more than slow_after seconds, and ok again when the data
        arrives. moecomm does not act on it: to remove a slow rank, name it in admit(leaving=...). A rank that does
        nothing within the timeout is lost.

        Parameters
        ----------
        slow_after : float
            Seconds of one wait.
        """
        now = time.monotonic()
        entries, waiting = self.native.waits()
        broken = self.native.broken()
        lost = broken.peer if broken is not None and broken.code == "lost" else None
        whom, since, phase = waiting if waiting is not None else (None, now, None)
        peers = []
        for r, (waits, waited, progress) in enumerate(entries):
            here = r == whom
            slow = here and now - since > slow_after
            state = "lost" if r == lost else "slow" if slow else "ok"
            quiet = now - progress if progress else None
            total = waited + (max(0.0, now - since) if here else 0.0)
            peers.append(PeerHealth(r, waits, total, quiet, state, phase if here else None))
        return Health(
            self.rank,
            tuple(p for p in peers if p.rank != self.rank),
            whom,
            max(0.0, now - since) if waiting is not None else 0.0,
        )

    def wait_matrix(self) -> torch.Tensor:
        """Return the seconds that each rank has waited for each other one, float64 [size, size]. Collective.

        Row r waits for column c, in this generation. A column with large values belongs to a slow rank, or to a rank
        behind a slow link. draw_waits makes an image of the matrix.

        Raises
        ------
        PeerTimeout, PeerLost
            A rank does not make the call within the timeout, or has ended.
        """
        self.order.require_open("wait_matrix")
        mine: list[Any] = [waited for _, waited, _ in self.native.waits()[0]]
        return torch.tensor(self.collective.exchange(mine, "wait_matrix"), dtype=torch.float64, device="cpu")
