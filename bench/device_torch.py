"""An alternative on the same GPU, interleaved with moecomm: the permute and unpermute of an all-to-all dispatcher.

Both move the tokens of all ranks. torch sorts the rows by expert, copies them once like an all-to-all (without the
second sort at the receivers), copies them back and computes their weighted sums.
"""

from __future__ import annotations

import statistics

import torch

import moecomm

from .device import World, arena_bytes, captured, replays, timed

CALLS = ("dispatch", "combine")


class Permuter:
    """Moves the tokens of all ranks of a World with torch. Routing and buffers are prepared."""

    def __init__(self, world):
        s = world.shape
        self._top_k, self._x = s.top_k, world.x.flatten(0, 1)
        self._token, self._inverse = world.order // s.top_k, torch.argsort(world.order)
        self._weights = world.weights.flatten()[world.order][:, None]
        self._sent = torch.empty((len(world.order), s.hidden), dtype=self._x.dtype, device=self._x.device)
        self._received = torch.empty_like(self._sent)

    def dispatch(self):
        """Return rows by expert [tokens * top_k, hidden]."""
        torch.index_select(self._x, 0, self._token, out=self._sent)
        return self._received.copy_(self._sent)

    def combine(self):
        """Return the weighted sums of these rows [tokens, hidden]."""
        self._sent.copy_(self._received)
        rows = (self._sent * self._weights).index_select(0, self._inverse)
        return rows.view(-1, self._top_k, rows.shape[1]).sum(1).to(self._x.dtype)


def in_turns(args, shape, size=8, sms=128, rounds=5):
    """{call: {"us", "torch_us", "ratio"}}: medians over rounds. The ratio is the time of torch / that of moecomm."""
    world = World(shape, size, args.device)
    permuter = Permuter(world)
    torch.cuda.synchronize()  # the streams of the ranks do not wait for this stream
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    origin.synchronize()
    ranks = moecomm.run_local(
        lambda comm: _rank(comm, args, world, sms // size, origin, permuter, rounds), size, device=args.device
    )
    found = {}
    for call in CALLS:
        own = [
            1e3 * (max(r[call][i][1] for r in ranks) - min(r[call][i][0] for r in ranks)) / args.iterations
            for i in range(rounds)
        ]
        other = [1e6 * ranks[0][call][i][2] for i in range(rounds)]
        found[call] = {
            "us": statistics.median(own),
            "torch_us": statistics.median(other),
            "ratio": statistics.median(t / o for t, o in zip(other, own, strict=True)),
        }
    return found


def _rank(comm, args, world, sms, origin, permuter, rounds):
    """Measure as one rank: {call: [(start ms, end ms, seconds of torch on rank 0)]}."""
    s, rank, capacity = world.shape, comm.rank, max(world.counts)
    buf = moecomm.Buffer(
        comm,
        hidden=s.hidden,
        num_experts=s.experts,
        top_k=s.top_k,
        max_tokens=s.tokens,
        num_sms=sms,
        arena_bytes=arena_bytes(capacity, s),
    )

    def dispatch():
        return buf.dispatch(world.x[rank], world.ids[rank], world.weights[rank], capacity=capacity)

    out, y = dispatch(), torch.empty_like(world.x[rank])

    def combine():
        return buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights, out=y)

    found = {call: [] for call in CALLS}
    for call, run in zip(CALLS, (dispatch, combine), strict=True):
        run()
        graph, kept = captured(comm, run)  # kept: keeps the memory alive that the graph writes
        for _ in range(rounds):
            comm.barrier()
            span = replays(graph, args.iterations, origin)
            comm.barrier()  # torch runs alone on the GPU
            found[call].append((*span, timed(getattr(permuter, call), 3) if rank == 0 else None))
        del graph, kept
        comm.barrier()
    buf.close()
    return found
