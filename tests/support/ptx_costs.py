"""Worlds of a real layer's row size for tools/ptx's costs: two nodes of two ranks, eight experts each, top 8."""

import contextlib

from worlds import random_world

import moecomm
from moecomm import tuning

HIDDEN, EXPERTS, TOP_K = 7168, 32, 8


def spread(hardware, traffic):
    """As on an H100, on one multiprocessor."""
    return tuning.replace(tuning.choose_plan(hardware, traffic, 2), num_sms=1, channels=8)


def dispatch_and_combine(tokens):
    """With weights beside the rows."""

    def main(comm):
        xs, ids, weights = (
            w[comm.rank] for w in random_world(comm.size, tokens, HIDDEN, EXPERTS, TOP_K, masked=0.0)
        )
        with contextlib.closing(
            moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=64)
        ) as buf:
            out = buf.dispatch(xs, ids, weights)
            out.handle.rows.copy_(out.x)
            buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights)

    return main


def decode(tokens):
    """A step of each kind: weights at the source, and weights that travel."""

    def main(comm):
        xs, ids, weights = (
            w[comm.rank] for w in random_world(comm.size, tokens, HIDDEN, EXPERTS, TOP_K, masked=0.0)
        )
        with contextlib.closing(
            moecomm.Buffer(
                comm,
                hidden=HIDDEN,
                num_experts=EXPERTS,
                top_k=TOP_K,
                max_tokens=64,
                decode=True,
                arena_bytes=1 << 16,
            )
        ) as buf:
            for travel in (None, weights):
                recv, _ = buf.decode_dispatch(xs, ids, topk_weights=travel, quant=None, return_hook=False)
                recv.handle.rows.copy_(recv.x)
                buf.decode_combine(
                    recv.handle.rows, ids, weights if travel is None else None, recv.handle, return_hook=False
                )

    return main


WORLDS = {"kernels": (dispatch_and_combine, 4, 2, 8, 24), "decode": (decode, 4, 2, 8, 24)}
