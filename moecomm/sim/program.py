"""What the ranks of a simulated cluster do, call after call."""

from __future__ import annotations


import torch

from .._native import sim as native
from .._native.quant import scale_words
from ..errors import InvalidArgument
from ..shapes import QUANTS, WIRES
from ..tensors import address, plain

MODES = ("local", "even", "optimal")  # by the numbers of balance::Mode


class Choosing:
    """How a batch's replicas are chosen, for Program.dispatch and Program.choose, and what was chosen when the last of them ran.

    mode, activate : as Buffer's `replicas` and `activate`, such that the choice needs the picks of all ranks
    routings : int by rank, optional
        Where they differ the call is a mismatch; 0: this rank makes a plain dispatch, its ids name slots.
    slots : list of int64 Tensor [T, top_k] by rank, what was chosen
    counted : list of int32 Tensor [logical experts] by rank, picks of all ranks
    """

    def __init__(self, mode="optimal", activate=None, routings=None):
        if mode not in MODES or (mode != "optimal" and activate is None):
            raise InvalidArgument(
                f"Choosing: mode is {mode!r}, activate is {activate!r}; expected a choice that needs the picks of all ranks",
                op="Choosing",
            )
        self.mode, self.activate, self.routings, self.slots, self.counted = (
            mode,
            activate,
            routings,
            None,
            None,
        )

    def _begin(self, program, topk_ids, experts, alone):
        self.slots = [torch.empty_like(ids) for ids in topk_ids]
        self.counted = [torch.zeros(experts, dtype=torch.int32, device="cpu") for _ in topk_ids]
        routings = self.routings or [1] * len(topk_ids)
        parts = [
            (_address(self.slots, r), self.counted[r].data_ptr(), routing) if routing else (0, 0, 0)
            for r, routing in enumerate(routings)
        ]
        program.choose(MODES.index(self.mode), self.activate or 0, parts, alone, (self.slots, self.counted))


class Program:
    """Calls that every rank makes, each as soon as it has finished the one before: ranks drift apart, as in real life."""

    def __init__(self, cluster):
        self._cluster = cluster
        self._native = native.Program()
        self.calls = []

    def __len__(self):
        return len(self._native)

    def dispatch(
        self,
        topk_ids=None,
        topk_weights=None,
        *,
        xs=None,
        scales=None,
        handle=0,
        layout="expert",
        expert_alignment=1,
        capacity=None,
        quant=None,
        choosing=None,
        before_ns=0.0,
    ):
        """Append a dispatch. topk_ids None: the handle's plan is reused; with choosing they name logical experts. before_ns: the rank
        computes before the call."""
        parts, coding, keep = self._sources(topk_ids, topk_weights, xs, scales, quant)
        self._native.dispatch(
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
            choosing._begin(self._native, keep[0], self._cluster.logical_experts, False)
        self.calls.append("dispatch")

    def choose(self, topk_ids, choosing):
        """Append the choice of a batch's replicas by itself, as decode makes it."""
        ids = [_contiguous(t, torch.int64) for t in topk_ids]
        self._native.dispatch(
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
        choosing._begin(self._native, ids, self._cluster.logical_experts, True)
        self.calls.append("choose")

    def combine(
        self,
        *,
        rows=None,
        topk_weights=None,
        bias=None,
        ys=None,
        handle=0,
        keep=False,
        flip=0,
        wire=None,
        echo_weights=False,
        before_ns=0.0,
    ):
        """Append a combine. rows None: the experts hand back what they received, the bits `flip` of
        every byte turned; echo_weights: weighted by what came with the rows; keep: the handle stays for another combine."""
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
        self._native.combine(
            handle, parts, keep, flip, WIRES[wire], echo_weights, before_ns, (rows, weights, bias, ys)
        )
        self.calls.append("combine")

    def decode_dispatch(
        self, topk_ids, topk_weights=None, *, xs=None, scales=None, quant=None, before_ns=0.0
    ):
        """Append the send phase of a decode dispatch; with topk_weights they travel, and experts' ranks sum what they send back."""
        parts, coding, keep = self._sources(topk_ids, topk_weights, xs, scales, quant)
        self._native.decode_dispatch(parts, *coding, before_ns, keep)
        self.calls.append("decode_dispatch")

    def decode_combine(
        self, topk_weights=None, *, rows=None, ys=None, flip=0, wire=None, earlier=False, before_ns=0.0
    ):
        """Append the send phase of the decode combine of the last decode dispatch; earlier: of the one before. rows, ys, flip: as for combine."""
        c = self._cluster
        weights = topk_weights and [_contiguous(t, torch.float32) for t in topk_weights]
        rows = rows and [_contiguous(t, c.dtype) for t in rows]
        self._native.decode_combine(
            [(_address(rows, r), _address(weights, r), _address(ys, r)) for r in range(c.size)],
            earlier,
            flip,
            WIRES[wire],
            before_ns,
            (weights, rows, ys),
        )
        self.calls.append("decode_combine")

    def decode_hook(self, *, after_combine=None, earlier=False):
        """Append a receive phase: of the last decode_combine (after_combine) or decode_dispatch; None: whichever came last; earlier: of the one before."""
        if after_combine is None:
            after_combine = (
                next(call for call in reversed(self.calls) if call.startswith("decode_")) == "decode_combine"
            )
        self._native.decode_hook(self._cluster.size, after_combine, earlier)
        self.calls.append("hook")

    def refuse(self, ranks, *, strays=False):
        """In the call that was appended last these ranks refuse their parts, and all ranks learn of it; strays: they make another call instead (a
        combine for a dispatch, or the reverse), with which no rank can go on."""
        self._native.refuse(list(ranks), strays)

    def _sources(self, topk_ids, topk_weights, xs, scales, quant):
        c = self._cluster
        if c.payload and xs is None:
            raise InvalidArgument("sim.dispatch: xs is None; a cluster with payload needs rows", op="sim")
        if topk_ids is None:
            parts = [(0, 0, 0, _address(xs, r), _address(scales, r)) for r in range(c.size)]
        else:
            topk_ids = [_contiguous(t, torch.int64) for t in topk_ids]
            for r, t in enumerate(topk_ids):
                if t.dim() != 2 or t.shape[1] != c.top_k or t.shape[0] > c.max_tokens:
                    raise InvalidArgument(
                        f"sim.dispatch: topk_ids of rank {r} is {list(t.shape)}; expected [T <= {c.max_tokens}, {c.top_k}]",
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
        # Quantized rows come with their scales, "given" without payload; or the call quantizes them.
        given = scales is not None or quant == "given"
        kind = 1 if given else QUANTS[quant]
        coding = (c.hidden if kind else c._row_bytes, 4 * scale_words(c.hidden, kind), kind, given)
        return parts, coding, (topk_ids, topk_weights, xs, scales)


def _contiguous(t, dtype):
    t = (
        plain("simulate", "a rank's tensor", t)
        if isinstance(t, torch.Tensor)
        else torch.as_tensor(t, dtype=dtype, device="cpu")
    )
    return t.to(dtype).contiguous()


def _address(tensors, rank):
    # An empty tensor has address 0, which would mean "left out".
    return 0 if tensors is None else address(tensors[rank]) or 1
