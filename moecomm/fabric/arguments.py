"""Argument checks of a Domain. They turn tensors into rows for the native code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._native import core
from ..checks import integer, require, spelled
from ..errors import InvalidArgument
from ..shapes import DTYPES
from ..tensors import plain, refuse_gradients
from .requests import Multicast, Reduce
from .rows import Row, extent, fits, indexed, overlaps_itself, rows_of

GroupCall = tuple[int, list[int], list[Row], int]  # for _group_calls of moecomm/_native/cpu_world/domain.pyx


def spelled_device(device: torch.device) -> str:
    """Return the name of a device for messages."""
    return "the CPU" if device.type == "cpu" else str(device)


class Arguments:
    """The part of Domain that checks arguments. Expects these attributes of Domain."""

    rank: int
    size: int
    ranks_per_node: int
    counters: int
    bytes: int
    _device: torch.device  # device of all tensors
    _on_gpu: bool
    _sends_own: bool  # the rail can only send from the domain's memory
    _begin: int  # address of the memory for tensors
    _heap: int  # offset of that memory in the window

    def _check_rank(self, op: str, name: str, rank: Any) -> int:
        return integer(op, name, rank, 0, self.size - 1)

    def _check_counter(self, op: str, counter: Any) -> int:
        return integer(op, "counter", counter, 0, self.counters - 1)

    def _offset_of(self, op: str, name: str, t: torch.Tensor) -> int:
        """Return the offset of a symmetric tensor in the memory of every rank."""
        begin, end = extent(t)
        if t.numel() and not (self._begin <= begin and end <= self._begin + self.bytes):
            raise InvalidArgument(
                f"{op}: {name} is {spelled(t)}, which is not symmetric; expected a tensor from domain.tensor(), or a "
                "view of one",
                op=op,
                rank=self.rank,
            )
        return begin - self._begin + self._heap if t.numel() else self._heap

    def _tensors(self, op: str, name: str, value: Any, written: bool) -> list[torch.Tensor]:
        """Return one tensor, or a list of them, as plain tensors on the device of the domain."""
        given = [value] if isinstance(value, torch.Tensor) or not isinstance(value, (list, tuple)) else value
        found = []
        for i, v in enumerate(given):
            at = name if given is not value else f"{name}[{i}]"
            t = plain(op, at, v, rank=self.rank, written=written)
            require(t.device == self._device, op, at, t, f"a tensor on {spelled_device(self._device)}")
            refuse_gradients(op, rank=self.rank, **{name: t})
            if written:
                require(
                    not overlaps_itself(t),
                    op,
                    at,
                    t,
                    "a tensor whose elements do not overlap in memory (not an expanded one)",
                )
            found.append(t.detach())
        return found

    def _pairs(self, op: str, dst: Any, src: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of tensors with equal dtypes."""
        to, of = self._tensors(op, "dst", dst, True), self._tensors(op, "src", src, False)
        require(len(to) == len(of), op, "src", src, f"as many tensors as dst has, {len(to)}")
        for i, (a, b) in enumerate(zip(to, of)):
            at = "src" if len(to) == 1 else f"src[{i}]"
            require(a.dtype == b.dtype, op, at, b, f"dst's dtype, {a.dtype}")
        return list(zip(to, of))

    def _one_sided(
        self, op: str, rank: int, dst: Any, src: Any, dst_rows: Any, src_rows: Any
    ) -> tuple[list[Row], list[Any]]:
        """Return (rows of a write or a read, objects to keep alive during the call)."""
        rows: list[Row] = []
        if dst_rows is None and src_rows is None and isinstance(dst, torch.Tensor) and rank != self.rank:
            run = self._one_run(op, dst, src)
            if run is not None:
                return [run], [dst, src]
        pairs = self._pairs(op, dst, src)
        picks = self._indices(op, pairs, dst_rows, src_rows)
        for to, of in pairs:
            there, here = (to, of) if op == "write" else (of, to)
            if rank // self.ranks_per_node != self.rank // self.ranks_per_node:
                self._require_sendable(op, "src" if op == "write" else "dst", here)
            offset = self._offset_of(op, "dst" if op == "write" else "src", there)
            if rank == self.rank:
                self._require_apart(op, to, of)
            if picks is None:
                require(to.shape == of.shape, op, "src", of, f"dst's shape, {list(to.shape)}")
                rows += rows_of(there, offset, here)
            else:
                rows += indexed(there, offset, picks[op != "write"], here, picks[op == "write"])
        return rows, [pairs, picks]

    def _one_run(self, op: str, dst: torch.Tensor, src: Any) -> Row | None:
        """Return the row of two contiguous tensors of equal shape and dtype; None if all checks are needed."""
        to = plain(op, "dst", dst, rank=self.rank, written=True)
        of = plain(op, "src", src, rank=self.rank)
        if to.dtype is not of.dtype or to.shape != of.shape or to.requires_grad or of.requires_grad:
            return None
        if self._on_gpu or not (to.is_contiguous() and of.is_contiguous() and to.is_cpu and of.is_cpu):
            return None
        there, here = (to, of) if op == "write" else (of, to)
        at, size = there.data_ptr() - self._begin, there.nbytes
        if size == 0 or at < 0 or at + size > self.bytes:
            return None
        return at + self._heap, here.data_ptr(), size, 1, 0, 0, 0, 0

    def _indices(
        self, op: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], dst_rows: Any, src_rows: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """Return (rows of dst, rows of src) as int64 vectors, or None if neither is given."""
        if dst_rows is None and src_rows is None:
            return None
        require(
            len(pairs) == 1,
            op,
            "tensors",
            len(pairs),
            "one tensor on each side if dst_rows or src_rows is given",
        )
        found: list[torch.Tensor | None] = []
        counts = []
        for name, t, index in (("dst", pairs[0][0], dst_rows), ("src", pairs[0][1], src_rows)):
            good = t.dim() >= 1 and (t.shape[0] == 0 or t[0].is_contiguous())
            require(
                good,
                op,
                name,
                t,
                "at least one dimension and contiguous rows, because dst_rows or src_rows is given",
            )
            if index is not None:
                index = plain(op, f"{name}_rows", index, rank=self.rank)
                good = (
                    index.dim() == 1
                    and index.dtype in (torch.int64, torch.int32)
                    and index.device in (torch.device("cpu"), self._device)
                )
                require(
                    good,
                    op,
                    f"{name}_rows",
                    index,
                    "a vector of int64 or int32, on the CPU or on the device of the rows",
                )
                index = index.to("cpu", torch.int64).contiguous()
                if index.numel():
                    low, high = int(index.min()), int(index.max())
                    require(low >= 0, op, f"{name}_rows", low, f"rows in 0..{t.shape[0] - 1}")
                    require(high < t.shape[0], op, f"{name}_rows", high, f"rows in 0..{t.shape[0] - 1}")
                if name == "dst":
                    require(index.unique().numel() == index.numel(), op, "dst_rows", index, "distinct rows")
            found.append(index)
            counts.append(t.shape[0] if index is None else index.numel())
        to, of = pairs[0]
        require(counts[0] == counts[1], op, "rows of src", counts[1], f"as many as of dst, {counts[0]}")
        require(to.shape[1:] == of.shape[1:], op, "src", of, f"rows of dst's shape, {list(to.shape[1:])}")
        return found[0], found[1]

    def _require_sendable(self, op: str, name: str, t: torch.Tensor) -> None:
        """Refuse memory from which the network between GPUs cannot send."""
        begin, end = extent(t)
        own = self._begin <= begin and end <= self._begin + self.bytes
        if self._sends_own and t.numel() and not own:
            raise InvalidArgument(
                f"{op}: {name} is {spelled(t)}, which the network of NCCL cannot access; expected a tensor from "
                "domain.tensor(), or a view of one; copy it there first",
                op=op,
                rank=self.rank,
            )

    def _require_apart(self, op: str, to: torch.Tensor, of: torch.Tensor) -> None:
        (a, a_end), (b, b_end) = extent(to), extent(of)
        same = a == b and to.stride() == of.stride()
        require(same or a_end <= b or b_end <= a, op, "dst", to, "memory that does not overlap with src")

    def _check_ranks(self, op: str, ranks: Any) -> list[int]:
        good = isinstance(ranks, (Sequence, range, torch.Tensor)) and not isinstance(ranks, str)
        require(good, op, "ranks", ranks, "a sequence of ranks")
        found = sorted(self._check_rank(op, "ranks", r) for r in ranks)
        require(len(set(found)) == len(found), op, "ranks", ranks, "distinct ranks")
        return found

    def _group_call(self, op: str, request: Any) -> tuple[GroupCall, list[Any], Any]:
        """Return (call, objects to keep alive, function to run at the end or None) of a Multicast or a Reduce."""
        ranks = self._check_ranks(op, request.ranks)
        root = self._check_rank(op, "root", request.root)
        multicast = isinstance(request, Multicast)
        shared, own = (request.dst, request.src) if multicast else (request.src, request.dst)
        shared_name, own_name = ("dst", "src") if multicast else ("src", "dst")
        there = self._tensors(op, shared_name, shared, multicast)
        if not multicast:
            self._check_sum(op, request, ranks, there)
        here: list[torch.Tensor | None] = [None] * len(there)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if root == self.rank:
            require(own is not None, op, own_name, own, f"tensors of {shared_name}'s shapes on the root")
            pairs = self._pairs(op, *((shared, own) if multicast else (own, shared)))
            for i, (to, of) in enumerate(pairs):
                require(to.shape == of.shape, op, "src", of, f"dst's shape, {list(to.shape)}")
                mine = of if multicast else to
                if (root in ranks) or not multicast:
                    self._require_apart(op, to, of)
                if not fits(there[i], mine):  # all ranks use the rows of the symmetric tensor
                    copy = (
                        mine.contiguous()
                        if multicast
                        else torch.empty(mine.shape, dtype=mine.dtype, device=self._device)
                    )
                    copies.append((mine, copy))
                    mine = copy
                if multicast:
                    self._require_sendable(op, own_name, mine)
                here[i] = mine
        rows: list[Row] = []
        for i, t in enumerate(there):
            rows += rows_of(t, self._offset_of(op, shared_name, t), here[i])
        dtype = DTYPES[there[0].dtype] if not multicast and there else 0
        finish = None if multicast or not copies else lambda: [to.copy_(copy) for to, copy in copies]
        return (root, ranks, rows, dtype), [there, here], finish

    def _check_sum(self, op: str, request: Reduce, ranks: list[int], src: list[torch.Tensor]) -> None:
        require(request.op == "sum", op, "op", request.op, "'sum'")
        require(len(ranks) >= 1, op, "ranks", request.ranks, "at least one rank")
        for i, t in enumerate(src):
            at = "src" if len(src) == 1 else f"src[{i}]"
            require(t.dtype in DTYPES, op, at, t, "bfloat16, float16, float32 or float64")
            require(t.dtype == src[0].dtype, op, at, t, f"one dtype in a request, {src[0].dtype}")
        wide = torch.float64 if src and src[0].dtype == torch.float64 else torch.float32
        allowed = (wide,) if src else (torch.float32, torch.float64)
        require(request.accumulate in allowed, op, "accumulate", request.accumulate, f"{wide} for such rows")
        of_nodes = [
            sum(r // self.ranks_per_node == n for r in ranks) for n in range(self.size // self.ranks_per_node)
        ]
        most = max(of_nodes) + sum(n > 0 for n in of_nodes) - 1
        require(
            most <= core.DOMAIN_RANKS,
            op,
            "ranks of a node, and nodes",
            most,
            f"at most {core.DOMAIN_RANKS} in a sum",
        )
