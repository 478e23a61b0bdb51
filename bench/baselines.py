"""Baselines that a user could choose instead: the same rows, sent directly to their ranks by one all-to-all.

tuned-mpi   packing and reduction of moecomm, preallocated buffers, and MPI_Alltoallv
tuned-gloo  the same with torch.distributed's all_to_all_single over gloo
tuned-impi, tuned-oneccl  the same over Intel MPI and oneCCL, in a separate environment (bench/rivals.py)
torch-gloo  the usual operations of torch: index_select, all_to_all_single, index_add_ (with the overhead of torch)

All send a token once per destination rank and sum in FP32. Routing, counts and addresses are computed before the
measurement, so the time of a baseline is only that of moving and adding rows. The time of moecomm includes its plan.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moecomm._native import core

from . import check, rivals
from .routing import TORCH_DTYPES

_NATIVE_DTYPE = {"bf16": 0, "f16": 1, "f32": 2}


class Routes:
    """Destinations and sources of one rank's rows, for one routing of all ranks (ids by rank)."""

    def __init__(self, case, rank, ids, weights):
        size, per_rank = len(ids), case.experts // len(ids)
        owner = torch.where(ids[rank] < 0, size, ids[rank] // per_rank)
        wanted = torch.zeros((len(owner), size + 1), dtype=torch.bool).scatter_(1, owner, True)[:, :size]
        destination, self.send_token = wanted.T.nonzero().unbind(1)
        self.send_counts = wanted.sum(0).tolist()
        # Index of row (token, rank) in the send buffer, and so in the returned rows; -1 if there is none.
        self.back = torch.full((len(owner), size), -1)
        self.back[self.send_token, destination] = torch.arange(len(destination))
        source, token = check.received_order(ids, rank, num_experts=case.experts, layout="rank")
        self.recv_counts = torch.bincount(source, minlength=size).tolist()
        self.tokens, self.sent, self.received = len(owner), len(destination), len(source)
        if case.layout == "expert":
            self._by_expert(case, rank, ids, weights, source, token)

    def _by_expert(self, case, rank, ids, weights, source, token):
        """For the expert layout: the received row that each row is a copy of, and the rows in the sum of each."""
        stride = max(len(i) for i in ids)
        where = torch.full((len(ids) * stride,), -1)
        where[source * stride + token] = torch.arange(len(source))
        row_source, row_token = check.received_order(ids, rank, num_experts=case.experts, layout="expert")
        self.replica = where[row_source * stride + row_token]
        per_rank = case.experts // len(ids)
        mine = [(i >= rank * per_rank) & (i < (rank + 1) * per_rank) for i in ids]
        # Picks in the order of the rows: by expert, source, token.
        parts = [(m.nonzero()[:, 0], i[m], w[m]) for m, i, w in zip(mine, ids, weights)]
        order = torch.cat([p[1] for p in parts]).argsort(stable=True)
        self.row_weight = torch.cat([p[2] for p in parts])[order].contiguous()
        # The k-th row (ascending expert) of every received row.
        by_received = self.replica.argsort(stable=True)
        count = torch.bincount(self.replica, minlength=len(source))
        first = count.cumsum(0) - count
        terms = int(count.max()) if len(count) else 1
        self.parts = torch.full((len(source), max(terms, 1)), -1)
        self.parts[
            self.replica[by_received], torch.arange(len(by_received)) - first[self.replica[by_received]]
        ] = by_received
        self.part_weight = torch.where(
            self.parts >= 0, self.row_weight[self.parts.clamp_min(0)] if len(self.row_weight) else 0.0, 0.0
        ).contiguous()


class MpiTransport:
    """Sends rows with MPI_Alltoallv. A row is one element of the datatype, so counts are small."""

    name = "tuned-mpi"

    def __init__(self, world, row_bytes):
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()

    def exchange(self, send, send_counts, recv, recv_counts):
        """send [S, H] to recv [R, H]; counts are rows per rank."""
        from mpi4py import MPI

        self._comm.Alltoallv(
            [MPI.memory.fromaddress(send.data_ptr(), send.nbytes), send_counts, None, self._row],
            [MPI.memory.fromaddress(recv.data_ptr(), recv.nbytes), recv_counts, None, self._row],
        )


class IntelMpiTransport(MpiTransport):
    """MpiTransport with an mpi4py that uses Intel MPI."""

    name = "tuned-impi"


class GlooTransport:
    """Sends rows with all_to_all_single over gloo."""

    name = "tuned-gloo"

    def __init__(self, world, row_bytes):
        world.gloo()

    def exchange(self, send, send_counts, recv, recv_counts):
        """send [S, H] to recv [R, H]; counts are rows per rank."""
        dist.all_to_all_single(recv.view(torch.uint8), send.view(torch.uint8), recv_counts, send_counts)


class Tuned:
    """Preallocated buffers and row kernels of moecomm, with another transport."""

    def __init__(self, world, case, transport):
        self.name, self._case, self._transport = transport.name, case, transport
        self._buffers = {}

    def prepare(self, routes):
        """Make buffers that are large enough. Not timed."""
        self.routes = routes
        for name, rows in (
            ("send", routes.sent),
            ("recv", routes.received),
            ("y", routes.tokens),
            *(
                (("rows", len(routes.replica)), ("part", routes.received))
                if self._case.layout == "expert"
                else ()
            ),
        ):
            if name not in self._buffers or len(self._buffers[name]) < rows:
                self._buffers[name] = torch.zeros(
                    (rows + rows // 16, self._case.hidden), dtype=TORCH_DTYPES[self._case.dtype]
                )

    def _buffer(self, name, rows):
        return self._buffers[name][:rows]

    def poison(self, value):
        """Overwrite the buffers with a value that is no result."""
        for buffer in self._buffers.values():
            buffer.fill_(value)

    def dispatch(self, x):
        """Dispatch; return the received rows in the layout of the case."""
        r, row_bytes = self.routes, self._case.row_bytes
        send, recv = self._buffer("send", r.sent), self._buffer("recv", r.received)
        core.gather_rows(send.data_ptr(), x.data_ptr(), r.send_token.data_ptr(), r.sent, row_bytes, True)
        self._transport.exchange(send, r.send_counts, recv, r.recv_counts)
        if self._case.layout == "rank":
            return recv
        rows = self._buffer("rows", len(r.replica))
        core.gather_rows(
            rows.data_ptr(), recv.data_ptr(), r.replica.data_ptr(), len(r.replica), row_bytes, True
        )
        return rows

    def combine(self, rows):
        """Combine; return y [T, hidden]."""
        r, case = self.routes, self._case
        dtype = _NATIVE_DTYPE[case.dtype]
        if case.layout == "expert":
            part = self._buffer("part", r.received)
            core.sum_rows(
                part.data_ptr(),
                rows.data_ptr(),
                r.parts.data_ptr(),
                r.part_weight.data_ptr(),
                r.received,
                r.parts.shape[1],
                case.hidden,
                dtype,
            )
            rows = part
        back, y = self._buffer("send", r.sent), self._buffer("y", r.tokens)
        self._transport.exchange(rows, r.recv_counts, back, r.send_counts)
        core.sum_rows(
            y.data_ptr(), back.data_ptr(), r.back.data_ptr(), 0, r.tokens, r.back.shape[1], case.hidden, dtype
        )
        return y


class TorchRecipe:
    """The usual operations of torch around all_to_all_single. Each call allocates its results."""

    name = "torch-gloo"

    def __init__(self, world, case):
        world.gloo()
        self._case = case

    def prepare(self, routes):
        """Store the routes."""
        self.routes = routes

    def poison(self, value):
        """Results are new memory, so fill blocks of the allocator, which it then reuses."""
        for rows in (self.routes.received, self.routes.sent):
            torch.full((rows, self._case.hidden), value, dtype=TORCH_DTYPES[self._case.dtype])

    def _all_to_all(self, send, send_counts, recv_counts):
        recv = torch.empty((sum(recv_counts), self._case.hidden), dtype=send.dtype)
        dist.all_to_all_single(recv, send, recv_counts, send_counts)
        return recv

    def dispatch(self, x):
        """Dispatch; return the received rows in the layout of the case."""
        r = self.routes
        recv = self._all_to_all(x.index_select(0, r.send_token), r.send_counts, r.recv_counts)
        return recv if self._case.layout == "rank" else recv.index_select(0, r.replica)

    def combine(self, rows):
        """Combine; return y [T, hidden]."""
        r = self.routes
        if self._case.layout == "expert":
            part = torch.zeros((r.received, self._case.hidden))
            rows = part.index_add_(0, r.replica, rows.float() * r.row_weight[:, None]).to(rows.dtype)
        back = self._all_to_all(rows, r.recv_counts, r.send_counts)
        y = torch.zeros((r.tokens, self._case.hidden))
        return y.index_add_(0, r.send_token, back.float()).to(back.dtype)


def make(name, world, case):
    """Make the baseline with this name."""
    if name == "torch-gloo":
        return TorchRecipe(world, case)
    transports = (MpiTransport, IntelMpiTransport, GlooTransport, rivals.OneCcl)
    transport = next(t for t in transports if t.name == name)
    return Tuned(world, case, transport(world, case.row_bytes))
