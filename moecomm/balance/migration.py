"""Migration: the weights of changed slots travel through a dispatch of their own, beside the running layers.

Every rank knows all moves, so nothing is announced: a slot's bytes are cut into rows, a row's only pick is the
rank that needs it, and rows of one source arrive in the order in which they were sent. Weights on a GPU move on a stream of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._cuda import cuda
from ..checks import require
from ..results import Pending
from ..tensors import plain
from ..buffer import Buffer

if TYPE_CHECKING:
    from ..communicator import Communicator
    from .placement import Placement

_ROW_BYTES = 1 << 16
_ROWS_PER_ROUND = 128  # of one source, so that a round's window stays small


def migrate(placement: Placement, weights: Sequence[Any], comm: Communicator) -> Migrating:
    """Move the weights of changed slots to where a placement wants them, in the background. Collective.

    Parameters
    ----------
    placement : Placement
        The new placement. Its .moves say what changes.
    weights : sequence over the layers of Tensor, list or dict of Tensors, each [slots of this rank, ...] on comm.device
        Laid out by the previous placement, to which .moves refer. They are only read. A slot has equal size on all ranks.
    comm : Communicator
        Of the placement's ranks. The migration uses a duplicate, so layers may run meanwhile.

    Returns
    -------
    Pending
        .wait() returns the new weights in the same form. Tensors of layers that do not change on this rank are the
        old ones. Call Buffer.use(placement) on every rank between the same batches to serve batches by them.

    Raises
    ------
    InvalidArgument
        comm or weights do not fit.
    ConfigMismatch
        Ranks disagree about the placement or the size of a slot.

    Source: DeepSeek-V3 technical report, section 3.4.1 (rearranging experts during serving).
    """
    return Migrating(Migration(placement, weights, comm))


class Migrating(Pending):
    """A migration under way. .version: of the placement that the new weights are for; .layers_done: layers that are complete."""

    def __init__(self, migration):
        self.version, self._migration = migration.placement.version, migration
        super().__init__(migration.comm, migration.run, migration)

    @property
    def layers_done(self):
        """Layers whose new weights are here, of placement.num_layers."""
        return self._migration.layers_done

    def wait(self):
        """The new weights, laid out as the old ones, when every rank has all of its own.

        Raises
        ------
        PeerLost, PeerTimeout
            A rank did not complete its part. The old weights are as they were, and stay in force.
        """
        try:
            return super().wait()
        finally:
            self._migration.close()


class Migration:
    """One rank's part. Construction is collective and happens in the caller's thread; run() in the background."""

    def __init__(self, placement, weights, comm):
        op = "migrate"
        require(hasattr(comm, "ranks_per_node"), op, "comm", type(comm).__qualname__, "a Communicator")
        comm._require_open(op)
        self.placement, self.weights = placement, weights
        self.layers_done, self._closed = 0, False
        per_rank, me = placement.slots_per_rank, comm.rank
        same = comm._everywhere(
            op, lambda: self._check(op, comm)
        )  # what is wrong on one rank is raised on all
        comm._require_equal(op, same)
        self._slot_bytes = same[me]["slot_bytes"]
        self._caller = torch.cuda.current_stream(comm.device) if comm._gpu is not None else None
        self._begin = self._caller and self._caller.record_event()
        # All moves of a layer, by source rank, in the order of the table: what leaves and arrives is read from it.
        self._moves = [[] for _ in range(placement.num_layers)]
        for layer, slot, _, source in placement.moves.tolist():
            self._moves[layer].append(
                (source // per_rank, slot // per_rank, source % per_rank, slot % per_rank)
            )
        self._row_bytes = min(_ROW_BYTES, max(16, -(-max(self._slot_bytes) // 16) * 16))
        self._rank = me
        self.comm = comm.duplicate()
        try:
            self._buffer = Buffer(
                self.comm,
                hidden=self._row_bytes // 4,
                num_experts=comm.size,
                top_k=1,
                max_tokens=_ROWS_PER_ROUND,
                dtype=torch.float32,
                num_sms=2,
            )
        except BaseException:
            self.comm.close()
            raise

    def _check(self, op, comm):
        """What must be equal on all ranks; refuses what does not fit."""
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
    def _tensors(entry):
        """A layer's tensors in a fixed order."""
        if isinstance(entry, torch.Tensor):
            return [entry]
        return list(entry.values()) if isinstance(entry, dict) else list(entry)

    @staticmethod
    def _like(entry, tensors):
        """The tensors in the form of the entry."""
        if isinstance(entry, torch.Tensor):
            return tensors[0]
        return dict(zip(entry, tensors)) if isinstance(entry, dict) else type(entry)(tensors)

    def run(self):
        """Move layer after layer; the new weights once every rank has its own."""
        new = []
        with self._aside():
            for layer in range(self.placement.num_layers):
                new.append(self._move_layer(layer))
                self.layers_done = layer + 1
            self._dispatch(self._no_rows(), [])  # done everywhere, or an error everywhere
        return new

    @contextlib.contextmanager
    def _aside(self):
        """On a GPU: a stream of its own, which begins where the caller's was and is through at the end."""
        if self._caller is None:
            yield
            return
        with cuda.own_stream(self.comm.device) as stream:
            stream.wait_event(self._begin)
            yield

    def _no_rows(self):
        return torch.empty((0, self._row_bytes), dtype=torch.uint8, device=self.comm.device)

    def _move_layer(self, layer):
        moves, entry = self._moves[layer], self.weights[layer]
        old = self._tensors(entry)
        arrivals = [m for m in moves if m[1] == self._rank]
        if not moves:
            return entry
        tensors = [t.clone() for t in old] if arrivals else old  # the running layers read the old ones
        for t in tensors if arrivals and self._caller else ():
            t.record_stream(self._caller)  # which will read the new ones
        rows_per_slot = -(-self._slot_bytes[layer] // self._row_bytes)
        local = [m for m in arrivals if m[0] == self._rank]
        remote = [m for m in moves if m[0] != m[1]]
        for _, _, source, slot in local:
            for t, o in zip(tensors, old):
                t[slot] = o[source]
        leaving = [m for m in remote if m[0] == self._rank]
        most = max((sum(m[0] == r for m in remote) for r in range(self.comm.size)), default=0) * rows_per_slot
        pieces = {m: [] for m in remote if m[1] == self._rank}
        expected = {
            r: [m for m in pieces if m[0] == r for _ in range(rows_per_slot)] for r in range(self.comm.size)
        }
        for first in range(0, most, _ROWS_PER_ROUND):
            rows, to = self._cut(old, leaving, rows_per_slot, first)
            for source, row in self._dispatch(rows, to):
                pieces[expected[source].pop(0)].append(row)
        for (_, _, _, slot), parts in pieces.items():
            self._paste(torch.cat(parts), [t[slot] for t in tensors])
        return self._like(entry, tensors)

    def _cut(self, tensors, leaving, rows_per_slot, first):
        """Rows [first, first + a round) of all that leaves, and their destinations."""
        rows, to = [], []
        for i in range(first, min(first + _ROWS_PER_ROUND, len(leaving) * rows_per_slot)):
            _, dest, source, _ = leaving[i // rows_per_slot]
            if not rows or i % rows_per_slot == 0:
                flat = torch.cat([t[source].reshape(-1).view(torch.uint8) for t in tensors])
                flat = torch.nn.functional.pad(flat, (0, rows_per_slot * self._row_bytes - len(flat))).view(
                    rows_per_slot, -1
                )
            rows.append(flat[i % rows_per_slot])
            to.append(dest)
        return torch.stack(rows) if rows else self._no_rows(), to

    def _dispatch(self, rows, to):
        """One round: (source rank, row) of everything that arrives, by source and in its order."""
        x = rows.view(torch.float32).view(-1, self._row_bytes // 4)
        out = self._buffer.dispatch(
            x, torch.tensor(to, dtype=torch.int64, device=x.device).view(-1, 1), layout="rank"
        )
        return list(zip(out.source_rank.tolist(), out.x.view(torch.uint8).clone()))

    @staticmethod
    def _paste(data, targets):
        at = 0
        for t in targets:
            n = t.numel() * t.element_size()
            t.copy_(data[at : at + n].view(t.dtype).view(t.shape))
            at += n

    def close(self):
        """Release the window and the communicator, once nothing runs any more."""
        if not self._closed:
            self._closed = True
            self._buffer.close()
            self.comm.close()
