"""The bare loop: only the row copies and sums of a case. All addresses are computed before the measurement.

No rank waits for another, nothing is planned, and all memory belongs to this rank. Each rank moves the same rows as
in moecomm: it copies its rows to the rail, places its own rows and those of its rail peers in its node, sums the rows
of its node for each rail peer, and sums the returned rows of its own tokens.
"""

from __future__ import annotations

import torch

from moecomm._native import core

from .routing import TORCH_DTYPES

_NATIVE_DTYPE = {"bf16": 0, "f16": 1, "f32": 2}


class Bare:
    """The loop for one rank of a case. It alternates with the contenders."""

    def __init__(self, world, case):
        self._case, self._rank = case, world.rank
        self._memory = {}

    def prepare(self, ids, weights):
        """Compute the addresses for one routing (ids and weights by rank)."""
        case, rank = self._case, self._rank
        node, local = divmod(rank, case.ranks_per_node)
        rail = [n * case.ranks_per_node + local for n in range(case.nodes)]
        peers = [source for source in rail if source != rank]

        self._own_token, own_rows, own_weights = self._placed(ids[rank], weights[rank], node, 0)
        placed, arrived, staged, self._sums = len(self._own_token), 0, [], []
        for source in peers:
            token, rows, row_weights = self._placed(ids[source], weights[source], node, placed)
            comes = (rows >= 0).any(1)
            staged.append((comes.cumsum(0) - 1)[token] + arrived)
            self._sums.append((rows[comes].contiguous(), row_weights[comes].contiguous()))
            placed, arrived = placed + len(token), arrived + int(comes.sum())
        self._staged = torch.cat(staged) if staged else torch.empty(0, dtype=torch.int64)

        self._sent, back = [], placed
        rows_of_y, weights_of_y = [own_rows], [own_weights]
        for source in peers:
            goes = (self._placed(ids[rank], weights[rank], source // case.ranks_per_node, 0)[1] >= 0).any(1)
            rows = torch.where(goes, goes.cumsum(0) - 1 + back, -1)[:, None]
            rows_of_y.append(rows)
            weights_of_y.append(torch.ones(rows.shape))
            self._sent.append(goes.nonzero().flatten())
            back += int(goes.sum())
        self._rows_of_y = torch.cat(rows_of_y, 1).contiguous()
        self._weights_of_y = torch.cat(weights_of_y, 1).contiguous()
        self.placed_rows, self.sent_rows, self.arrived_rows = placed, back - placed, arrived
        for name, rows in (
            ("rows", back),
            ("stage", max(arrived, back - placed)),
            ("y", len(ids[rank])),
        ):
            self._reserve(name, rows)

    def _placed(self, ids, weights, node, first):
        """Rows from a source to a node: (token of each row, row ids by token [T, columns] or -1, their weights).

        Row ids start with `first`.
        """
        case = self._case
        owner = torch.where(ids < 0, -1, ids // (case.experts // case.ranks))
        here = (owner >= 0) & (owner // case.ranks_per_node == node)
        if case.layout == "rank":
            column = torch.where(here, owner % case.ranks_per_node, case.ranks_per_node)
            here = torch.zeros((len(ids), case.ranks_per_node + 1), dtype=torch.bool)
            here = here.scatter_(1, column, True)[:, :-1]
            weights = torch.ones(here.shape)
        token, column = here.nonzero().unbind(1)
        rows = torch.full(here.shape, -1)
        rows[token, column] = torch.arange(len(token)) + first
        return token.contiguous(), rows, weights

    def _reserve(self, name, rows):
        memory = self._memory.get(name)
        if memory is None or len(memory) < rows:
            shape = (rows + rows // 16 + 1, self._case.hidden)
            self._memory[name] = torch.zeros(shape, dtype=TORCH_DTYPES[self._case.dtype])

    @property
    def nbytes(self):
        """Bytes that dispatch writes."""
        return (self.placed_rows + self.sent_rows) * self._case.row_bytes

    def poison(self, value):
        """Overwrite the results, as for every contender."""
        self._memory["rows"].fill_(value)
        self._memory["y"].fill_(value)

    def dispatch(self, x):
        """Copy every row with streaming stores."""
        rows, stage = self._memory["rows"], self._memory["stage"]
        for tokens in self._sent:
            self._gather(stage, 0, x, tokens)
        self._gather(rows, 0, x, self._own_token)
        self._gather(rows, len(self._own_token), stage, self._staged)

    def combine(self):
        """Sum the rows of every token."""
        rows, stage, y = self._memory["rows"], self._memory["stage"], self._memory["y"]
        for places, weights in self._sums:
            self._sum(stage, rows, places, weights)
        self._sum(y, rows, self._rows_of_y, self._weights_of_y)

    def _gather(self, out, first, rows, index):
        row_bytes = self._case.row_bytes
        at = out.data_ptr() + first * row_bytes
        core.gather_rows(at, rows.data_ptr(), index.data_ptr(), len(index), row_bytes, True)

    def _sum(self, out, rows, places, weights):
        core.sum_rows(
            out.data_ptr(),
            rows.data_ptr(),
            places.data_ptr(),
            weights.data_ptr() if self._case.layout == "expert" else 0,
            len(places),
            places.shape[1],
            self._case.hidden,
            _NATIVE_DTYPE[self._case.dtype],
        )
