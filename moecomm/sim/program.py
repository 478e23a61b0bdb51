"""Program: the sequence of calls that the ranks of a simulated cluster make."""

from __future__ import annotations

from typing import Any


import torch

from .._native import sim as native
from .._native.quant import scale_words
from ..errors import InvalidArgument
from ..shapes import QUANTS, WIRES
from ..tensors import address, plain

MODES = ("local", "even", "optimal")  # in the order of balance::Mode


class Choosing:
    """How Program.dispatch and Program.choose choose the replicas of a batch, and the result of the last run.

    Parameters
    ----------
    mode, activate
        As `replicas` and `activate` of Buffer. The choice must need the picks of all ranks.
    routings : list of int by rank, optional
        If they differ, the call is a mismatch. 0: the rank makes a plain dispatch, and its ids are slots.

    Attributes
    ----------
    slots : list of Tensor int64 [T, top_k] by rank
        The chosen slots.
    counted : list of Tensor int32 [logical experts] by rank
        Picks of all ranks.
    """

    def __init__(self, mode: str = "optimal", activate: Any = None, routings: Any = None) -> None:
        if mode not in MODES or (mode != "optimal" and activate is None):
            raise InvalidArgument(
                f"Choosing: mode is {mode!r} and activate is {activate!r}; expected mode 'optimal', or 'local' or "
                "'even' with activate (a choice that needs the picks of all ranks)",
                op="Choosing",
            )
        self.mode, self.activate, self.routings, self.slots, self.counted = (
            mode,
            activate,
            routings,
            None,
            None,
        )


def _begin_choice(choosing: Any, program: Any, topk_ids: Any, experts: Any, alone: bool) -> None:
    """Add a choice of replicas to a native program. It writes choosing.slots and .counted."""
    choosing.slots = [torch.empty_like(ids) for ids in topk_ids]
    choosing.counted = [torch.zeros(experts, dtype=torch.int32, device="cpu") for _ in topk_ids]
    routings = choosing.routings or [1] * len(topk_ids)
    slots, counted = choosing.slots, choosing.counted
    parts = [
        (_address(slots, r), counted[r].data_ptr(), routing) if routing else (0, 0, 0)
        for r, routing in enumerate(routings)
    ]
    program.choose(MODES.index(choosing.mode), choosing.activate or 0, parts, alone, (slots, counted))


class Program:
    """Calls that every rank makes. A rank starts each call when it has finished the one before, without a barrier."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.native = native.Program()
        self.calls: list[Any] = []

    def __len__(self) -> int:
        return len(self.native)

    def dispatch(
        self,
        topk_ids: Any = None,
        topk_weights: Any = None,
        *,
        xs: Any = None,
        scales: Any = None,
        handle: Any = 0,
        layout: str = "expert",
        expert_alignment: int = 1,
        capacity: int | None = None,
        quant: str | None = None,
        choosing: Any = None,
        before_ns: Any = 0.0,
    ) -> None:
        """Append a dispatch.

        topk_ids None reuses the plan of the handle. With `choosing`, topk_ids are logical experts. before_ns is the
        time that each rank computes before the call.
        """
        parts, coding, keep = self._sources(topk_ids, topk_weights, xs, scales, quant)
        self.native.dispatch(  # type: ignore[call-arg]
            handle,
            parts,
            layout == "rank",
            expert_alignment,
            -1 if capacity is None else capacity,
            *coding,
            before_ns,
            keep,
        )
        if choosing:
            _begin_choice(choosing, self.native, keep[0], self._cluster.logical_experts, False)
        self.calls.append("dispatch")

    def choose(self, topk_ids: Any, choosing: Any) -> None:
        """Append a separate choice of replicas, as decode makes it."""
        ids = [_contiguous(t, torch.int64) for t in topk_ids]
        self.native.dispatch(
            0,
            [(len(t), _address(ids, r), 0, 0, 0) for r, t in enumerate(ids)],
            False,
            1,
            -1,
            0,
            0,
            0,
            False,
            0.0,
            ids,
        )
        _begin_choice(choosing, self.native, ids, self._cluster.logical_experts, True)
        self.calls.append("choose")

    def combine(
        self,
        *,
        rows: Any = None,
        topk_weights: Any = None,
        bias: Any = None,
        ys: Any = None,
        handle: Any = 0,
        keep: Any = False,
        flip: int = 0,
        wire: str | None = None,
        echo_weights: bool = False,
        before_ns: Any = 0.0,
    ) -> None:
        """Append a combine.

        rows None: the experts return the rows that they received, each byte XORed with `flip`. echo_weights: the rows
        are weighted with the weights that came with them. keep: the handle remains valid for another combine.
        """
        c = self._cluster
        rows = rows and [_contiguous(t, c.dtype) for t in rows]
        weights = topk_weights and [_contiguous(t, torch.float32) for t in topk_weights]
        bias = bias and [_contiguous(t, torch.float32) for t in bias]
        parts = [
            (
                _address(rows, r),
                _address(weights, r),
                _address(bias, r),
                c.hidden if bias and bias[r].dim() == 2 else 0,
                _address(ys, r),
            )
            for r in range(c.size)
        ]
        self.native.combine(
            handle, parts, keep, flip, WIRES[wire], echo_weights, before_ns, (rows, weights, bias, ys)
        )
        self.calls.append("combine")

    def decode_dispatch(
        self,
        topk_ids: Any,
        topk_weights: Any = None,
        *,
        xs: Any = None,
        scales: Any = None,
        quant: str | None = None,
        before_ns: Any = 0.0,
    ) -> None:
        """Append the send phase of a decode dispatch.

        With topk_weights the weights travel with the tokens, and each owner rank sums its rows of a token in combine.
        """
        parts, coding, keep = self._sources(topk_ids, topk_weights, xs, scales, quant)
        self.native.decode_dispatch(parts, *coding, before_ns, keep)  # type: ignore[call-arg]
        self.calls.append("decode_dispatch")

    def decode_combine(
        self,
        topk_weights: Any = None,
        *,
        rows: Any = None,
        ys: Any = None,
        flip: int = 0,
        wire: str | None = None,
        earlier: Any = False,
        before_ns: Any = 0.0,
    ) -> None:
        """Append the send phase of a decode combine, of the last decode dispatch or, with `earlier`, the one before.

        A dispatch may be combined again after the hook of its combine. rows, ys, flip: as for combine.
        """
        c = self._cluster
        weights = topk_weights and [_contiguous(t, torch.float32) for t in topk_weights]
        rows = rows and [_contiguous(t, c.dtype) for t in rows]
        self.native.decode_combine(
            [(_address(rows, r), _address(weights, r), _address(ys, r)) for r in range(c.size)],
            earlier,
            flip,
            WIRES[wire],
            before_ns,
            (weights, rows, ys),
        )
        self.calls.append("decode_combine")

    def decode_hook(self, *, after_combine: bool | None = None, earlier: Any = False) -> None:
        """Append a receive phase.

        after_combine: of the last decode_combine (True), decode_dispatch (False), or the later of the two (None).
        earlier: of the call before that.
        """
        if after_combine is None:
            after_combine = (
                next(call for call in reversed(self.calls) if call.startswith("decode_")) == "decode_combine"
            )
        self.native.decode_hook(self._cluster.size, after_combine, earlier)
        self.calls.append("hook")

    def decode_mask(self, ranks: Any) -> None:
        """Append a mask, if there are ranks: they are dead, and the others go on without them.

        Picks of their experts count as -1 from here on. A step that the mask interrupts has no result.
        """
        if ranks:
            self.native.decode_mask(self._cluster.size, list(ranks))
            self.calls.append("mask")

    def leave_out(self, ranks: Any) -> None:
        """Let these ranks not make the call that was appended last."""
        self.native.leave_out(list(ranks))

    def refuse(self, ranks: Any, *, strays: Any = False) -> None:
        """Let these ranks refuse the call that was appended last. All ranks learn of it.

        strays: they make another call instead, combine for dispatch or the reverse, after which no rank can continue.
        """
        self.native.refuse(list(ranks), strays)

    def _sources(self, topk_ids: Any, topk_weights: Any, xs: Any, scales: Any, quant: str | None) -> Any:
        c = self._cluster
        if c.payload and xs is None:
            raise InvalidArgument(
                "sim.dispatch: xs is None; expected a list of rows, because the cluster has payload", op="sim"
            )
        if topk_ids is None:
            parts = [(0, 0, 0, _address(xs, r), _address(scales, r)) for r in range(c.size)]
        else:
            topk_ids = [_contiguous(t, torch.int64) for t in topk_ids]
            for r, t in enumerate(topk_ids):
                if t.dim() != 2 or t.shape[1] != c.top_k or t.shape[0] > c.max_tokens:
                    raise InvalidArgument(
                        f"sim.dispatch: topk_ids of rank {r} is {list(t.shape)}; "
                        f"expected [T <= {c.max_tokens}, {c.top_k}]",
                        op="sim",
                    )
            parts = [
                (
                    len(topk_ids[r]),
                    _address(topk_ids, r),
                    _address(topk_weights, r),
                    _address(xs, r),
                    _address(scales, r),
                )
                for r in range(c.size)
            ]
        # Rows are already quantized if they have scales or, without payload, if quant is "given".
        given = scales is not None or quant == "given"
        kind = 1 if given else QUANTS[quant]
        coding = (c.hidden if kind else c.row_bytes, 4 * scale_words(c.hidden, kind), kind, given)
        return parts, coding, (topk_ids, topk_weights, xs, scales)


def _contiguous(t: Any, dtype: torch.dtype) -> Any:
    t = (
        plain("simulate", "a rank's tensor", t)
        if isinstance(t, torch.Tensor)
        else torch.as_tensor(t, dtype=dtype, device="cpu")
    )
    return t.to(dtype).contiguous()


def _address(tensors: Any, rank: int) -> Any:
    # An empty tensor has address 0, which means "not given" in native code.
    return 0 if tensors is None else address(tensors[rank]) or 1
