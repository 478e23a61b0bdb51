"""Calls that one rank of a world refuses, and the errors on all ranks; for rank threads and for processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from decode_steps import check_step
from survivors import describe, join
from worlds import assert_received, assert_same, random_world

import moecomm
from moecomm import ops, reference

HIDDEN, TOKENS, TOP_K = 16, 6, 2


class Step:
    """A world's buffer on one rank, and valid calls on it that are compared with the oracle."""

    def __init__(self, comm, **more):
        self.comm, self.experts, self.seed = comm, 4 * comm.size, 0
        self.buf = moecomm.Buffer(
            comm,
            hidden=HIDDEN,
            num_experts=self.experts,
            top_k=TOP_K,
            max_tokens=TOKENS,
            channels=2,
            arena_bytes=1 << 17,
            **more,
        )

    def next_inputs(self):
        """Return x, ids and weights of this rank. They differ in every call, so that stale rows are detected."""
        self.seed += 1
        self.world = random_world(
            self.comm.size, TOKENS, HIDDEN, self.experts, TOP_K, seed=self.seed, masked=0
        )
        return tuple(part[self.comm.rank] for part in self.world)

    def dispatch(self):
        """Run a valid dispatch and compare it."""
        x, ids, weights = self.next_inputs()
        out = self.buf.dispatch(x, ids, weights)
        self.want = reference.dispatch(*self.world, num_experts=self.experts)
        assert_received(out, self.want[self.comm.rank], self.comm.rank)
        return out

    def round_trip(self):
        """Run a valid dispatch and combine, and compare them."""
        out = self.dispatch()
        rows = [w.x * (r + 1) for r, w in enumerate(self.want)]
        y = self.buf.combine(rows[self.comm.rank], out.handle)
        expected = reference.combine(
            rows, self.want, [TOKENS] * self.comm.size, ranks_per_node=self.comm.ranks_per_node
        )
        assert_same(y, expected[self.comm.rank], f"rank {self.comm.rank}: y")

    def decode(self):
        """Run a valid decode step and compare it."""
        self.next_inputs()
        check_step(self.comm, self.buf, self.world)


def refuse(step, wrong, right, refusing, why="arguments"):
    """Run one call: `wrong` on the refusing ranks, `right` on the others. It must raise an error on all ranks."""
    rank = step.comm.rank
    call = wrong if rank in refusing else right
    try:
        call()
    except moecomm.InvalidArgument as error:
        assert error.rank == rank or (error.rank is None and rank in refusing), error
        if rank in refusing:
            assert error.peer is None and not getattr(error, "__notes__", None), (error, error.__notes__)
        else:
            assert (
                error.peer == min(refusing)
                and f"rank {min(refusing)} refused its part" in str(error)
                and why in str(error)
            ), error
        return
    except ZeroDivisionError:  # raised by the caller's code
        assert rank in refusing
        return
    raise AssertionError(f"rank {rank}: no error")


def _wrong_dispatches(step):
    """Return {name: (a refused call, the reason that its peers report)}."""
    x, ids, weights = step.next_inputs()
    out_of_range, twice = ids.clone(), ids.clone()
    out_of_range[3, 1], twice[2, 1] = step.experts, twice[2, 0]
    many = torch.zeros(TOKENS + 1, HIDDEN).bfloat16(), torch.zeros(TOKENS + 1, TOP_K).long()
    buf = step.buf

    def hooked():
        with_hook = buf.register_hook("pre_dispatch", lambda _: 1 // 0)
        try:
            buf.dispatch(x, ids)
        finally:
            with_hook.remove()

    return {
        "too many tokens": (lambda: buf.dispatch(*many), "arguments"),
        "dtype": (lambda: buf.dispatch(x.float(), ids), "arguments"),
        "no tensor": (lambda: buf.dispatch([1], ids), "arguments"),
        "an id": (lambda: buf.dispatch(x, out_of_range), "topk_ids"),
        "an id twice": (lambda: buf.dispatch(x, twice, weights), "topk_ids"),
        "layout": (lambda: buf.dispatch(x, ids, layout="diagonal"), "arguments"),
        "handle": (lambda: buf.dispatch(x, handle="handle"), "arguments"),
        "check": (lambda: buf.dispatch(x, ids, weights * float("nan"), check=True), "arguments"),
        "later": (lambda: buf.dispatch(x, out_of_range, async_op=True).wait(), "topk_ids"),
        "a hook": (hooked, "an error"),
        "an operator": (
            lambda: ops.dispatch(x.float(), ids, None, None, buf.name, "expert", 1, None),
            "arguments",
        ),
        "a gradient": (lambda: buf.dispatch(x.clone().requires_grad_(), ids[:2]), "arguments"),
    }


DISPATCHES = (
    "too many tokens",
    "dtype",
    "no tensor",
    "an id",
    "an id twice",
    "layout",
    "handle",
    "check",
    "later",
    "a hook",
    "an operator",
    "a gradient",
)


def _wrong_combines(step, out):
    x, rows, buf = step.world[0][step.comm.rank], out.x.clone(), step.buf

    def hooked():
        with_hook = buf.register_hook("pre_combine", lambda _: 1 // 0)
        try:
            buf.combine(rows, out.handle)
        finally:
            with_hook.remove()

    return {
        "rows": (lambda: buf.combine(rows[:-1], out.handle), "arguments"),
        "no handle": (lambda: buf.combine(rows, None), "arguments"),
        "weights": (lambda: buf.combine(rows, out.handle, topk_weights=torch.ones(1).double()), "arguments"),
        "bias": (lambda: buf.combine(rows, out.handle, bias=torch.zeros(3)), "arguments"),
        "wire": (lambda: buf.combine(rows, out.handle, wire="int4"), "arguments"),
        "out": (lambda: buf.combine(rows, out.handle, out=x[:1].clone()), "arguments"),
        "later": (lambda: buf.combine(rows, None, async_op=True), "arguments"),
        "a hook": (hooked, "an error"),
        "an operator": (
            lambda: ops.combine(rows, None, None, torch.tensor([123456789]), buf.name, "expert", TOKENS),
            "arguments",
        ),
    }


COMBINES = ("rows", "no handle", "weights", "bias", "wire", "out", "later", "a hook", "an operator")


def _wrong_decode_dispatches(step):
    x, ids, weights = step.next_inputs()
    out_of_range = ids.clone()
    out_of_range[3, 1] = step.experts
    many = torch.zeros(TOKENS + 1, HIDDEN).bfloat16(), torch.zeros(TOKENS + 1, TOP_K).long()
    buf = step.buf
    return {
        "too many tokens": (lambda: buf.decode_dispatch(*many, quant=None), "arguments"),
        "dtype": (lambda: buf.decode_dispatch(x.float(), ids, quant=None), "arguments"),
        "an id": (lambda: buf.decode_dispatch(x, out_of_range, quant=None), "topk_ids"),
        "quant": (lambda: buf.decode_dispatch(x, ids, quant="int4"), "arguments"),
        "weights": (lambda: buf.decode_dispatch(x, ids, quant=None, topk_weights=weights[:1]), "arguments"),
    }


DECODE_DISPATCHES = ("too many tokens", "dtype", "an id", "quant", "weights")


def _wrong_decode_combines(step, recv):
    _, ids, weights = (part[step.comm.rank] for part in step.world)
    buf = step.buf
    return {
        "rows": (lambda: buf.decode_combine(recv.x[:1], ids, weights, recv.handle), "arguments"),
        "other ids": (
            lambda: buf.decode_combine(recv.handle.rows, ids.flip(1), weights, recv.handle),
            "topk_ids",
        ),
        "handle": (lambda: buf.decode_combine(recv.handle.rows, ids, weights, "handle"), "arguments"),
        "wire": (
            lambda: buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, wire="int4"),
            "arguments",
        ),
    }


DECODE_COMBINES = ("rows", "other ids", "handle", "wire")


def refused_dispatch(step, name, refusing):
    """Refuse one dispatch with this name while the others' calls are valid."""
    wrong, why = _wrong_dispatches(step)[name]
    x, ids, weights = (part[step.comm.rank] for part in step.world)
    refuse(step, wrong, lambda: step.buf.dispatch(x, ids, weights), refusing, why)


def refused_redispatch(step, refusing):
    """Reuse the plan on all ranks except the refusing ones."""
    out = step.dispatch()
    x = step.next_inputs()[0]
    refuse(
        step,
        lambda: step.buf.dispatch(x[:2], handle=out.handle),
        lambda: step.buf.dispatch(x, handle=out.handle),
        refusing,
    )


def refused_combine(step, name, refusing, *, slots=False):
    """Refuse one combine with this name while the others' calls are valid."""
    out = step.dispatch()
    wrong, why = _wrong_combines(step, out)[name]
    rows, weights = out.x.clone(), out.topk_weights.clone()
    ticket = out.handle.tensor()
    right = (
        (lambda: ops.combine_slots(rows, weights, ticket, step.buf.name, "expert", TOKENS))
        if slots
        else (lambda: step.buf.combine(rows, out.handle))
    )
    refuse(step, wrong, right, refusing, why)


def refused_decode_dispatch(step, name, refusing):
    """Refuse one decode_dispatch with this name while the others' calls are valid, including the hook."""
    wrong, why = _wrong_decode_dispatches(step)[name]
    x, ids, _ = (part[step.comm.rank] for part in step.world)

    def right():
        step.buf.decode_dispatch(x, ids, quant=None)[1]()

    refuse(step, wrong, right, refusing, why)


def refused_decode_combine(step, name, refusing):
    """Refuse one decode_combine with this name while the others' calls are valid, including the hook.

    All ranks have tokens for all.
    """
    rank, size = step.comm.rank, step.comm.size
    x, _, weights = step.next_inputs()
    ids = (
        [(torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) + r) % size * 4 for r in range(size)]
        if size > 2
        else [torch.tensor([[0, 4]] * TOKENS) for _ in range(size)]
    )
    step.world = step.world[0], ids, step.world[2]
    recv, hook = step.buf.decode_dispatch(x, ids[rank], quant=None)
    hook()
    wrong, why = _wrong_decode_combines(step, recv)[name]

    def right():
        step.buf.decode_combine(recv.handle.rows, ids[rank], weights, recv.handle)[1]()

    refuse(step, wrong, right, refusing, why)


def main(folder, rank, size, per_node, refusing):
    """Refuse every verb once in a process; each next call must be correct. Writes FOLDER/RANK.json."""
    os.environ["MOECOMM_RAIL"] = "auto"
    comm = moecomm.Communicator(join(folder, "world", rank, size), ranks_per_node=per_node, timeout=120)
    seen = {}
    try:
        step = Step(comm)
        step.round_trip()
        for name in ("too many tokens", "an id", "a hook"):
            refused_dispatch(step, name, refusing)
            step.round_trip()
        refused_redispatch(step, refusing)
        refused_combine(step, "rows", refusing)
        step.round_trip()
        refused_combine(step, "no handle", refusing)
        step.round_trip()
        for name in ("dtype", "an id"):
            refused_decode_dispatch(step, name, refusing)
            step.decode()
        refused_decode_combine(step, "rows", refusing)
        step.decode()
        step.round_trip()
        seen["good"] = True
        comm.barrier()
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    comm.close()
    torch.distributed.destroy_process_group()
