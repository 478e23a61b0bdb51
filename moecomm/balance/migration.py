"""Migration: moves the weights of changed slots while the layers keep running.

Every rank knows all moves, so ranks exchange no metadata. In the cpu world an expert is multicast to the ranks that
need it (multicast.py). On GPUs that map each other's memory its bytes go by the copy engine (copies.py), else they are
the rows of a dispatch (rows.py); both on a separate stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._cuda import cuda
from ..checks import require
from ..results import Pending
from ..tensors import plain
from .copies import CopyMover
from .multicast import MulticastMover
from .rows import RowMover

if TYPE_CHECKING:
    from ..communicator import Communicator
    from .placement import Placement


def migrate(placement: Placement, weights: Sequence[Any], comm: Communicator) -> Migrating:
    """Move the weights of changed slots to their ranks in a new placement, in the background. Collective.

    Parameters
    ----------
    placement : Placement
        The new placement. Its .moves list the changes.
    weights : sequence over the layers of Tensor, list or dict of Tensors, each [slots of this rank, ...] on comm.device
        Weights in the slots of the previous placement. They are only read. The bytes of a slot must be equal on all
        ranks.
    comm : Communicator
        Has the ranks of the placement. The migration runs on a duplicate, so layers may use comm meanwhile.

    Returns
    -------
    Pending
        .wait() returns the new weights in the same form. Layers that do not change on this rank keep their tensors.
        To use the new weights, call Buffer.use(placement) on all ranks between the same two batches.

    Raises
    ------
    InvalidArgument
        comm has another number of ranks, or weights do not match the placement.
    ConfigMismatch
        Ranks disagree about the placement or the bytes of a slot.

    Source: DeepSeek-V3 technical report, section 3.4.1 (rearranging experts during serving).
    """
    return Migrating(Migration(placement, weights, comm))


class Migrating(Pending[list[Any]]):
    """A migration under way.

    Attributes
    ----------
    version : int
        Version of the new placement.
    layers_done : int
        Number of complete layers.
    """

    def __init__(self, migration: Migration) -> None:
        self.version, self._migration = migration.placement.version, migration
        super().__init__(migration.comm, migration.run, migration)

    @property
    def traffic(self) -> dict[str, Any] | None:
        """Rows and bytes moved by this rank per hop, as in Buffer.stats() or Domain.stats(); None until the end."""
        return self._migration.traffic

    @property
    def layers_done(self) -> int:
        """Number of layers whose new weights are complete on this rank."""
        return self._migration.layers_done

    def wait(self) -> list[Any]:
        """Wait until all ranks have their new weights; return this rank's, in the form of the old ones.

        Raises
        ------
        PeerLost, PeerTimeout
            A rank did not complete its part. The old weights are unchanged and remain in use.
        """
        try:
            return super().wait()
        finally:
            self._migration.close()


class Migration:
    """One rank's part. Construction is collective, in the caller's thread; run() executes in the background."""

    def __init__(self, placement: Placement, weights: Sequence[Any], comm: Communicator) -> None:
        op = "migrate"
        require(hasattr(comm, "ranks_per_node"), op, "comm", type(comm).__qualname__, "a Communicator")
        comm.order.require_open(op)
        self.placement, self.weights = placement, weights
        self.layers_done, self._closed = 0, False
        self.traffic: dict[str, Any] | None = None
        per_rank, me = placement.slots_per_rank, comm.rank
        # An argument that is wrong on one rank raises on all ranks.
        same = comm.collective.everywhere(op, lambda: self._check(op, comm))
        comm.collective.require_equal(op, same)
        slot_bytes = same[me]["slot_bytes"]
        self._caller = torch.cuda.current_stream(comm.device) if comm.gpu is not None else None
        self._begin = self._caller and self._caller.record_event()
        # Moves of each layer, by slot: (slot, expert that it gets, slot that has the expert).
        self._moves: list[list[tuple[int, int, int]]] = [[] for _ in range(placement.num_layers)]
        for layer, slot, expert, source in placement.moves.tolist():
            self._moves[layer].append((slot, expert, source))
        self._rank = me
        self.comm = comm.duplicate()
        mover: Any = MulticastMover
        if self._caller is not None:
            mover = CopyMover if comm.maps_peers else RowMover
        try:
            self._mover = mover(self.comm, slot_bytes, per_rank)
        except BaseException:
            self.comm.close()
            raise

    def _check(self, op: str, comm: Communicator) -> dict[str, Any]:
        """Check the arguments; return the values that must be equal on all ranks."""
        placement, weights, per_rank = self.placement, self.weights, self.placement.slots_per_rank
        require(
            placement.num_ranks == comm.size,
            op,
            "comm",
            comm,
            f"a communicator of the placement's {placement.num_ranks} ranks",
        )
        require(
            isinstance(weights, Sequence) and not isinstance(weights, str),
            op,
            "weights",
            type(weights).__qualname__,
            "a list with one entry per layer",
        )
        require(
            len(weights) == placement.num_layers,
            op,
            "weights",
            len(weights),
            f"one entry per layer, {placement.num_layers}",
        )
        slot_bytes = []
        for layer, w in enumerate(weights):
            known = isinstance(w, (torch.Tensor, dict, list, tuple))
            require(
                known, op, f"weights[{layer}]", type(w).__qualname__, "a tensor, or a list or dict of tensors"
            )
            slot_bytes.append(0)
            for t in self._tensors(w):
                require(
                    isinstance(t, torch.Tensor), op, f"weights[{layer}]", type(t).__qualname__, "a tensor"
                )
                plain(op, f"weights[{layer}]", t)
                ok = (
                    t.layout == torch.strided
                    and t.dim() >= 1
                    and t.shape[0] == per_rank
                    and t.is_contiguous()
                    and t.device == comm.device
                )
                require(
                    ok,
                    op,
                    f"weights[{layer}]",
                    f"{t.dtype} {t.layout} {list(t.shape)} on {t.device}",
                    f"contiguous tensors of {per_rank} slots on {comm.device}",
                )
                slot_bytes[-1] += t[0].numel() * t.element_size()
        return {"version": placement.digest, "slot_bytes": slot_bytes}

    @staticmethod
    def _tensors(entry: Any) -> list[torch.Tensor]:
        """The tensors of a layer, in a fixed order."""
        if isinstance(entry, torch.Tensor):
            return [entry]
        return list(entry.values()) if isinstance(entry, dict) else list(entry)

    @staticmethod
    def _like(entry: Any, tensors: list[torch.Tensor]) -> Any:
        """The tensors as a tensor, dict or list like `entry`."""
        if isinstance(entry, torch.Tensor):
            return tensors[0]
        return dict(zip(entry, tensors)) if isinstance(entry, dict) else type(entry)(tensors)

    def run(self) -> list[Any]:
        """Move one layer after the other; return the new weights when all ranks have theirs."""
        new = []
        with self._own_stream():
            for layer in range(self.placement.num_layers):
                new.append(self._move_layer(layer))
                self.layers_done = layer + 1
            self._mover.finish()
        self.traffic = self._mover.stats()
        return new

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """On a GPU, run on a separate stream, after the caller's earlier work, and wait for it at the end."""
        if self._caller is None:
            yield
            return
        with cuda.own_stream(self.comm.device) as stream:
            stream.wait_event(self._begin)
            yield

    def _move_layer(self, layer: int) -> Any:
        moves, entry, per_rank = self._moves[layer], self.weights[layer], self.placement.slots_per_rank
        old = self._tensors(entry)
        if not moves:
            return entry
        arrivals = [m for m in moves if m[0] // per_rank == self._rank]
        tensors = [t.clone() for t in old] if arrivals else old  # layers still read the old tensors
        if arrivals and self._caller is not None:
            for t in tensors:
                t.record_stream(self._caller)  # the caller's stream will read the new tensors
        for slot, _, source in arrivals:
            if source // per_rank == self._rank:
                for t, o in zip(tensors, old):
                    t[slot % per_rank] = o[source % per_rank]
        self._mover.move(moves, old, tensors, layer)
        return self._like(entry, tensors)

    def close(self) -> None:
        """Release the mover's memory and the duplicate communicator. Call it when nothing runs any more."""
        if not self._closed:
            self._closed = True
            self._mover.close()
            self.comm.close()
