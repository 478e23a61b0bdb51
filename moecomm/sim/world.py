"""The sim world: the same protocol, every role a fiber on a virtual clock. Hundreds of ranks in one process.

With payload it moves real rows, and its results equal those of the cpu world bit for bit; without, it
predicts times and counts at a scale that no one machine holds.
"""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from .._native import sim as native
from ..checks import integer, number, require
from ..errors import InvalidArgument, MoecommError
from ..testing.reference import DecodeReceived, Received
from ..shapes import DTYPES, arena_size, check_shape
from .program import Program

# How far roles of large worlds (more than STRICT_TOKENS tokens in all) run ahead of the clock unless told otherwise:
# times change by a few percent at most, since many ranks share every link.
LEAD_NS, DECODE_LEAD_NS = 2_000.0, 50_000.0
STRICT_TOKENS = 10_000
RATES = ("node_rate", "rail_rate", "sm_read", "sm_write")  # of Hardware; the others are times
SCHEDULES = ("roles", "lane", "seats")


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

    Raises
    ------
    InvalidArgument
        A value is no number, or one that the virtual clock cannot hold.
    """

    node_rate: float = 160.0
    node_latency: float = 800.0
    rail_rate: float = 50.0
    rail_latency: float = 2500.0
    rail_message: float = 5.0
    sm_read: float = 200.0  # what DeepEP V2 plans its multiprocessors with, as the next one; the others are assumed, see tables/clusters
    sm_write: float = 50.0
    put: float = 50.0
    poll: float = 200.0
    launch: float = 4000.0
    plan_token: float = 0.5

    def __post_init__(self):
        for f in fields(self):
            value, rate = getattr(self, f.name), f.name in RATES
            require(not isinstance(value, bool), "Hardware", f.name, value, "a number")
            low, unit = (1e-6, "GB/s") if rate else (0.0, "ns")
            found = number("Hardware", f.name, value, low)
            require(found <= 1e9, "Hardware", f.name, value, f"at most 1e9 {unit}")
            object.__setattr__(self, f.name, found)


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
    decode : bool
        With the decode path.
    schedule : "roles", "lane" or "seats"
        How a rank runs dispatch and combine: every role of every channel side by side; one after another, as the cpu world
        does (decode too); or in the cuda world's seats, ordered by its gates.
    arena_bytes : int, optional
        As for Buffer.
    placement : moecomm.balance.Placement, optional
        Experts are its slots then, and dispatches may choose replicas in its first layer by the picks of all ranks.

    Raises
    ------
    InvalidArgument
        An argument is out of range.
    """

    def __init__(
        self,
        size,
        *,
        ranks_per_node=None,
        hidden,
        num_experts,
        top_k,
        max_tokens,
        dtype=torch.bfloat16,
        num_sms=20,
        channels=None,
        hardware=Hardware(),
        payload=False,
        decode=False,
        schedule="roles",
        arena_bytes=None,
        placement=None,
    ):
        size = integer("Cluster", "size", size, 1, 65535)
        ranks_per_node = (
            size if ranks_per_node is None else integer("Cluster", "ranks_per_node", ranks_per_node, 1, 65535)
        )
        require(
            size % ranks_per_node == 0,
            "Cluster",
            "size",
            size,
            f"a multiple of ranks_per_node = {ranks_per_node}",
        )
        require(isinstance(hardware, Hardware), "Cluster", "hardware", hardware, "a Hardware")
        if schedule not in SCHEDULES:
            raise InvalidArgument(
                f"Cluster: schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}", op="Cluster"
            )
        check_shape(size, hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, 0)
        self.size, self.ranks_per_node, self.hidden, self.num_experts, self.top_k = (
            size,
            ranks_per_node,
            hidden,
            num_experts,
            top_k,
        )
        self.max_tokens, self.dtype, self.num_sms, self.channels = (
            max_tokens,
            dtype,
            num_sms,
            channels or num_sms,
        )
        self.hardware, self.payload, self.decode_path = hardware, payload, decode
        if placement is not None and (placement.num_slots, placement.num_ranks) != (num_experts, size):
            raise InvalidArgument(
                f"Cluster: placement is {placement}; expected one of {size} ranks and num_experts = {num_experts} slots",
                op="Cluster",
            )
        self.placement, self.logical_experts = placement, placement.num_experts if placement else 0
        arena_bytes = arena_bytes or arena_size(size, hidden, num_experts, top_k, max_tokens, dtype)
        self._native = native.Cluster(
            size,
            ranks_per_node,
            num_sms,
            hidden,
            DTYPES[dtype],
            num_experts,
            top_k,
            max_tokens,
            self.channels,
            arena_bytes,
            payload,
            decode,
            SCHEDULES.index(schedule),
            min(num_sms, max_tokens),
            asdict(hardware),
            placement.physical_to_logical[0].tolist() if placement else [],
            self.logical_experts,
        )
        self._row_bytes = hidden * dtype.itemsize

    # -- programs: what every rank does, call after call --------------------------------------------

    def program(self):
        """An empty Program for this cluster."""
        return Program(self)

    def reset(self, seed=None, lead_ns=0.0):
        """A clean start of clock, windows and counters. With a seed, what the Fabric contract leaves open is drawn from it.

        lead_ns: a role may run ahead of others by that much virtual time before it gives way. 0 follows the clock
        strictly; some microseconds are many times faster in real time, and share links in turns of that length.
        """
        self._native.reset(seed, lead_ns)

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
        times = np.empty((len(program), self.size, 2), dtype=np.uint64)
        for call, rank, code, phase, peer, expected, got in self._native.run(program._native, times):
            waiting = "; ".join(describe_waiting(w) for w in self._native.stuck())
            raise MoecommError(
                f"sim: call {call} of rank {rank} ended with {code} in phase {phase} (peer {peer}, expected {expected}, got {got})"
                + (f". Nobody could go on: {waiting}" if waiting else ""),
                op="sim",
                phase=phase,
                rank=rank,
                peer=peer,
                expected=expected,
                got=got,
            )
        return times / 1e6

    # -- one call at a time, with payload -----------------------------------------------------------

    def dispatch(
        self,
        xs,
        topk_ids,
        topk_weights=None,
        *,
        layout="expert",
        expert_alignment=1,
        capacity=None,
        scales=None,
        choosing=None,
    ):
        """Dispatch of the whole world: arguments are lists by rank. Needs payload.

        Returns
        -------
        list of reference.Received
            Copies of what every rank received.
        """
        p = self.program()
        p.dispatch(
            topk_ids,
            topk_weights,
            xs=xs,
            layout=layout,
            expert_alignment=expert_alignment,
            capacity=capacity,
            scales=scales,
            choosing=choosing,
        )
        self.run(p)
        return [
            self._received(rank, 0, layout, xs[rank].dtype, 0 if scales is None else scales[rank].shape[1])
            for rank in range(self.size)
        ]

    def combine(self, rows, *, topk_weights=None, bias=None, num_tokens):
        """Combine of the whole world after dispatch(): lists by rank. Returns y by rank."""
        ys = [torch.full((t, self.hidden), float("nan"), dtype=self.dtype, device="cpu") for t in num_tokens]
        p = self.program()
        p.combine(rows=rows, topk_weights=topk_weights, bias=bias, ys=ys)
        self.run(p)
        return ys

    def decode_dispatch(self, xs, topk_ids, topk_weights=None, *, scales=None):
        """Decode dispatch of the whole world, both phases; lists by rank. Returns a list of reference.DecodeReceived (copies)."""
        p = self.program()
        p.decode_dispatch(topk_ids, topk_weights, xs=xs, scales=scales)
        p.decode_hook()
        self.run(p)
        received = []
        for rank in range(self.size):
            address, rows, x, at_scales, counts = self._native.packed(rank)
            experts, columns = self.num_experts // self.size, 0 if scales is None else scales[rank].shape[1]
            per_expert = rows // experts
            received.append(
                DecodeReceived(
                    _copy(address + x, xs[rank].dtype, experts, per_expert, self.hidden),
                    torch.stack([_copy(address + at, torch.float32, per_expert, columns) for at in at_scales])
                    if columns
                    else None,
                    _copy(address + counts, torch.int64, experts),
                )
            )
        return received

    def decode_combine(self, rows, topk_weights=None, *, num_tokens):
        """Decode combine of the whole world after decode_dispatch(), both phases; lists by rank. Returns y by rank."""
        ys = [torch.full((t, self.hidden), float("nan"), dtype=self.dtype, device="cpu") for t in num_tokens]
        p = self.program()
        p.decode_combine(topk_weights, rows=rows, ys=ys)
        p.decode_hook()
        self.run(p)
        return ys

    def stats(self):
        """By rank, the counters that Buffer.stats() has, since the last reset()."""
        return [self._native.counters(r) for r in range(self.size)]

    def links(self):
        """By rank: {rail, node}: rows, row_bytes, other_bytes, messages; busy: picoseconds by link. Since the last reset()."""
        return [self._native.links(r) for r in range(self.size)]

    # -- the fast path ------------------------------------------------------------------------------

    def step(self, topk_ids, *, quant=None, layout="expert", lead_ns=None):
        """Times of one dispatch and combine of this routing.

        Parameters
        ----------
        topk_ids : list of int64 Tensor [T, top_k] by rank, or one Tensor [ranks, T, top_k]
        quant : None, "given", "fp8" or "fp8_ue8m0"
            Rows of dispatch: of the buffer's dtype, quantized before, or by the call. Combine carries the buffer's dtype.
        lead_ns : as for reset(); None: chosen by the size
        """
        self.reset(lead_ns=_lead(topk_ids, LEAD_NS) if lead_ns is None else lead_ns)
        p = self.program()
        p.dispatch(topk_ids, layout=layout, quant=quant)
        p.combine()
        times = self.run(p)
        spans = times[:, :, 1] - times[:, :, 0]
        return Step(
            spans[0], spans[1], float(times[:, :, 1].max() - times[:, :, 0].min()), self.stats(), self.links()
        )

    def decode_step(self, topk_ids, *, quant="fp8", steps=1, lead_ns=None):
        """Times of decode_dispatch and decode_combine, each with its receive phase, of this routing.

        Parameters
        ----------
        topk_ids : as for step()
        quant : "fp8" or None
            Rows of dispatch; combine carries the buffer's dtype.
        steps : int
            How many in a row, without a barrier; the last one is reported.
        lead_ns : as for reset(); None: chosen by the size
        """
        self.reset(lead_ns=_lead(topk_ids, DECODE_LEAD_NS) if lead_ns is None else lead_ns)
        p = self.program()
        for _ in range(steps):
            p.decode_dispatch(topk_ids, quant=quant)
            p.decode_hook()
            p.decode_combine()
            p.decode_hook()
        t = self.run(p)[-4:]
        return Step(
            t[1, :, 1] - t[0, :, 0],
            t[3, :, 1] - t[2, :, 0],
            float(t[:, :, 1].max() - t[:, :, 0].min()),
            self.stats(),
            self.links(),
        )

    # -- inside -------------------------------------------------------------------------------------

    def _received(self, rank, handle, layout, dtype, scale_columns):
        address, n, (rows, scales, weights, ids, source) = self._native.block(rank, handle)

        def view(offset, dtype, *shape):
            return _copy(address + offset, dtype, *shape)

        by_rank = layout == "rank"
        origin = view(source, torch.int64, n)
        tokens, padded = self._native.plan(rank, handle)
        return Received(
            view(rows, dtype, n, self.hidden),
            view(scales, torch.float32, n, scale_columns) if scale_columns else None,
            view(weights, torch.float32, *((n, self.top_k) if by_rank else (n,))),
            view(ids, torch.int64, n, self.top_k) if by_rank else None,
            torch.tensor(tokens, dtype=torch.int64, device="cpu"),
            torch.tensor(padded, dtype=torch.int64, device="cpu"),
            origin >> 32,
            torch.where(origin < 0, origin, origin & 0xFFFFFFFF),
        )


def describe_waiting(w):
    """One waiting role in words."""
    channel = f"[{w['channel']}]" if w["channel"] >= 0 else ""
    return f"rank {w['rank']} {w['role']}{channel} waits for rank {w['peer']} in phase {w['phase']} (counter >= {w['at_least']})"


def _lead(topk_ids, large):
    return large if sum(len(ids) for ids in topk_ids) > STRICT_TOKENS else 0.0


def _copy(address, dtype, *shape):
    count = int(np.prod(shape))
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape).clone()
