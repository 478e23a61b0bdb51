"""The sim world: the same protocol, every role a fiber on a virtual clock. Hundreds of ranks in one process.

With payload it moves real rows, and its results equal those of the cpu world bit for bit; without, it
predicts times and counts at a scale that no one machine holds.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ._native import sim as native
from .buffer import _DTYPES, _arena_bytes, _check_shape
from .errors import InvalidArgument, MoecommError
from .reference import Received


@dataclass(frozen=True)
class Hardware:
    """What a cluster is made of. Rates in GB/s (each direction), times in ns.

    node_rate, node_latency : load/store domain inside a node (NVLink), per rank
    rail_rate, rail_latency, rail_message : network, per rank; the NIC's time per message
    sm_read, sm_write : row operations of one multiprocessor
    put : a role's time to post a put or a signal
    poll : from a counter's change to the waiter's next instruction
    launch : start of a kernel
    plan_token : counting the picks of one token
    """

    node_rate: float = 160.0
    node_latency: float = 800.0
    rail_rate: float = 50.0
    rail_latency: float = 2500.0
    rail_message: float = 5.0
    sm_read: float = 200.0
    sm_write: float = 50.0
    put: float = 50.0
    poll: float = 200.0
    launch: float = 4000.0
    plan_token: float = 0.5


@dataclass(frozen=True)
class Step:
    """One simulated dispatch and combine.

    dispatch_us, combine_us : float64 [ranks], each rank's time in the call
    total_us : float, from the first rank's start to the last rank's end
    stats : per rank, as Buffer.stats()
    links : per rank, bytes that crossed its links and picoseconds that they were busy
    """

    dispatch_us: np.ndarray
    combine_us: np.ndarray
    total_us: float
    stats: list
    links: list


class Cluster:
    """A simulated world of `size` ranks with one Buffer each.

    Parameters
    ----------
    size, ranks_per_node : int
    hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels
        As for Buffer; channels None: one per multiprocessor.
    hardware : Hardware
    payload : bool
        Rows are really moved. Without, only times and counts are right.
    arena_bytes : int, optional
        As for Buffer.

    Raises
    ------
    InvalidArgument
        An argument is out of range.
    """

    def __init__(self, size, *, ranks_per_node=None, hidden, num_experts, top_k, max_tokens, dtype=torch.bfloat16, num_sms=20, channels=None,
                 hardware=Hardware(), payload=False, arena_bytes=None):
        ranks_per_node = ranks_per_node or size
        if not isinstance(size, int) or size < 1 or size % ranks_per_node:
            raise InvalidArgument(f"Cluster: size is {size!r}; expected a multiple of ranks_per_node = {ranks_per_node}", op="Cluster")
        _check_shape(size, hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, 0)
        self.size, self.ranks_per_node, self.hidden, self.num_experts, self.top_k = size, ranks_per_node, hidden, num_experts, top_k
        self.max_tokens, self.dtype, self.num_sms, self.channels = max_tokens, dtype, num_sms, channels or num_sms
        self.hardware, self.payload = hardware, payload
        arena_bytes = arena_bytes or _arena_bytes(size, hidden, num_experts, top_k, max_tokens, dtype)
        self._native = native.Cluster(size, ranks_per_node, num_sms, hidden, _DTYPES[dtype], num_experts, top_k, max_tokens, self.channels,
                                      arena_bytes, payload, asdict(hardware))
        self._row_bytes = hidden * dtype.itemsize

    # -- programs: what every rank does, call after call --------------------------------------------

    def program(self):
        """An empty Program for this cluster."""
        return Program(self)

    def reset(self, seed=None):
        """A clean start of clock, windows and counters. With a seed, what the Fabric contract leaves open is drawn from it."""
        self._native.reset(seed)

    def run(self, program):
        """Run a Program to its end; the windows keep what it left.

        Returns
        -------
        float64 [calls, ranks, 2]
            Begin and end of every call on every rank, in us of virtual time.

        Raises
        ------
        MoecommError
            A call failed; names the call, the rank, and every role that waited when nobody could go on.
        """
        results = self._native.run(program._native)
        for call, ranks in enumerate(results):
            for rank, (_, _, code, phase, peer, expected, got, _, ran) in enumerate(ranks):
                if ran and code != "ok":
                    waiting = "; ".join(describe_waiting(w) for w in self._native.stuck())
                    raise MoecommError(f"sim: call {call} of rank {rank} ended with {code} in phase {phase} (peer {peer}, expected {expected}, got {got})"
                                       + (f". Nobody could go on: {waiting}" if waiting else ""), op="sim", phase=phase, rank=rank, peer=peer,
                                       expected=expected, got=got)
        return np.array([[(r[0], r[1]) for r in ranks] for ranks in results]) / 1e6

    # -- one call at a time, with payload -----------------------------------------------------------

    def dispatch(self, xs, topk_ids, topk_weights=None, *, layout="expert", expert_alignment=1, capacity=None, scales=None):
        """Dispatch of the whole world: arguments are lists by rank. Needs payload.

        Returns
        -------
        list of reference.Received
            Copies of what every rank received.
        """
        p = self.program()
        p.dispatch(topk_ids, topk_weights, xs=xs, layout=layout, expert_alignment=expert_alignment, capacity=capacity, scales=scales)
        self.run(p)
        return [self._received(rank, 0, layout, xs[rank].dtype, 0 if scales is None else scales[rank].shape[1]) for rank in range(self.size)]

    def combine(self, rows, *, topk_weights=None, bias=None, num_tokens):
        """Combine of the whole world after dispatch(): lists by rank. Returns y by rank."""
        ys = [torch.full((t, self.hidden), float("nan"), dtype=self.dtype) for t in num_tokens]
        p = self.program()
        p.combine(rows=rows, topk_weights=topk_weights, bias=bias, ys=ys)
        self.run(p)
        return ys

    def stats(self):
        """By rank, the counters that Buffer.stats() has, since the last reset()."""
        return [self._native.counters(r) for r in range(self.size)]

    def links(self):
        """By rank: {rail, node}: rows, row_bytes, other_bytes, messages; busy: picoseconds by link. Since the last reset()."""
        return [self._native.links(r) for r in range(self.size)]

    # -- the fast path ------------------------------------------------------------------------------

    def step(self, topk_ids, *, quant=None, layout="expert"):
        """Times of one dispatch and combine of this routing.

        Parameters
        ----------
        topk_ids : list of int64 Tensor [T, top_k] by rank, or one Tensor [ranks, T, top_k]
        quant : None or "fp8"
            Rows of dispatch; combine carries the buffer's dtype.
        """
        self.reset()
        p = self.program()
        p.dispatch(topk_ids, layout=layout, quant=quant)
        p.combine()
        times = self.run(p)
        spans = times[:, :, 1] - times[:, :, 0]
        return Step(spans[0], spans[1], float(times[:, :, 1].max() - times[:, :, 0].min()), self.stats(), self.links())

    # -- inside -------------------------------------------------------------------------------------

    def _received(self, rank, handle, layout, dtype, scale_columns):
        address, n, (rows, scales, weights, ids, source) = self._native.block(rank, handle)

        def view(offset, dtype, *shape):
            count = int(np.prod(shape))
            if count == 0:
                return torch.empty(shape, dtype=dtype)
            raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address + offset)
            return torch.frombuffer(raw, dtype=dtype).view(shape).clone()

        by_rank = layout == "rank"
        origin = view(source, torch.int64, n)
        tokens, padded = self._native.plan(rank, handle)
        return Received(view(rows, dtype, n, self.hidden), view(scales, torch.float32, n, scale_columns) if scale_columns else None,
                        view(weights, torch.float32, *((n, self.top_k) if by_rank else (n,))),
                        view(ids, torch.int64, n, self.top_k) if by_rank else None, torch.tensor(tokens), torch.tensor(padded),
                        origin >> 32, torch.where(origin < 0, origin, origin & 0xFFFFFFFF))


class Program:
    """Calls that every rank makes, each as soon as it has finished the one before: ranks drift apart, as in real life."""

    def __init__(self, cluster):
        self._cluster = cluster
        self._native = native.Program()
        self.calls = []

    def __len__(self):
        return len(self._native)

    def dispatch(self, topk_ids=None, topk_weights=None, *, xs=None, scales=None, handle=0, layout="expert", expert_alignment=1, capacity=None,
                 quant=None, before_ns=0.0):
        """Append a dispatch. topk_ids None: the handle's plan is reused. before_ns: the rank computes before the call."""
        c = self._cluster
        if topk_ids is None:
            parts = [(0, 0, 0, _address(xs, r), _address(scales, r)) for r in range(c.size)]
        else:
            ids = [_contiguous(t, torch.int64) for t in topk_ids]
            for r, t in enumerate(ids):
                if t.dim() != 2 or t.shape[1] != c.top_k or t.shape[0] > c.max_tokens:
                    raise InvalidArgument(f"sim.dispatch: topk_ids of rank {r} is {list(t.shape)}; expected [T <= {c.max_tokens}, {c.top_k}]", op="sim")
            topk_ids = ids
            parts = [(len(ids[r]), ids[r].data_ptr() or 1, _address(topk_weights, r), _address(xs, r), _address(scales, r)) for r in range(c.size)]
        if c.payload and xs is None:
            raise InvalidArgument("sim.dispatch: xs is None; a cluster with payload needs rows", op="sim")
        fp8 = scales is not None or quant == "fp8"
        row_bytes = c.hidden if fp8 else c._row_bytes
        scale_bytes = (c.hidden + 127) // 128 * 4 if fp8 else 0
        self._native.dispatch(handle, parts, layout == "rank", expert_alignment, -1 if capacity is None else capacity, row_bytes, scale_bytes,
                              before_ns, (topk_ids, topk_weights, xs, scales))
        self.calls.append("dispatch")

    def combine(self, *, rows=None, topk_weights=None, bias=None, ys=None, handle=0, keep=False, echo_weights=False, before_ns=0.0):
        """Append a combine. rows None: the experts hand back what they received; echo_weights: weighted by what came with the rows."""
        c = self._cluster
        rows = rows and [_contiguous(t, c.dtype) for t in rows]
        weights = topk_weights and [_contiguous(t, torch.float32) for t in topk_weights]
        bias = bias and [_contiguous(t, torch.float32) for t in bias]
        parts = [(_address(rows, r), _address(weights, r), _address(bias, r), c.hidden if bias and bias[r].dim() == 2 else 0, _address(ys, r))
                 for r in range(c.size)]
        self._native.combine(handle, parts, keep, echo_weights, before_ns, (rows, weights, bias, ys))
        self.calls.append("combine")


def describe_waiting(w):
    """One waiting role in words."""
    channel = f"[{w['channel']}]" if w["channel"] >= 0 else ""
    return f"rank {w['rank']} {w['role']}{channel} waits for rank {w['peer']} in phase {w['phase']} (counter >= {w['at_least']})"


def _contiguous(t, dtype):
    t = t if isinstance(t, torch.Tensor) else torch.as_tensor(t)
    return t.to(dtype).contiguous()


def _address(tensors, rank):
    # An empty tensor has address 0, which would mean "left out".
    return 0 if tensors is None else tensors[rank].data_ptr() or 1
