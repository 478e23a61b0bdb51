"""The sim world: the same protocol, with every role a fiber on a virtual clock. Hundreds of ranks in one process.

With payload it moves real rows, and its results equal those of the cpu world bit for bit. Without payload it predicts
times and counts for clusters that are too large for one machine.
"""

from __future__ import annotations

from typing import Any

from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from .._native import sim as native
from ..checks import integer, number, require
from ..errors import InvalidArgument, MoecommError
from ..testing.reference import DecodeReceived, Received
from ._memory import copy_of
from ..shapes import DTYPES, arena_size, check_shape
from .program import Program

# Default of lead_ns for worlds with more than STRICT_TOKENS tokens over all ranks: how far a role runs ahead of the
# clock. Times change by a few percent at most, because many ranks share every link.
LEAD_NS, DECODE_LEAD_NS = 2_000.0, 50_000.0
STRICT_TOKENS = 10_000
RATES = ("node_rate", "rail_rate", "sm_read", "sm_write")  # of Hardware; the others are times
SCHEDULES = ("roles", "lane", "groups")


@dataclass(frozen=True)
class Hardware:
    """Rates and delays of a cluster. Rates in GB/s per direction, times in ns.

    Attributes
    ----------
    node_rate, node_latency : float
        Loads and stores inside a node (NVLink), per rank.
    rail_rate, rail_latency, rail_message : float
        Network between nodes, per rank. rail_message is the time of the NIC per message.
    sm_read, sm_write : float
        Rates at which one multiprocessor reads and writes rows.
    put : float
        Time of a role to post a put or a signal.
    poll : float
        Time from the change of a counter to the next instruction of the waiting role.
    launch : float
        Time to start a kernel.
    plan_token : float
        Time to count the picks of one token.

    Raises
    ------
    InvalidArgument
        A value is not a number or is out of range.
    """

    node_rate: float = 160.0
    node_latency: float = 800.0
    rail_rate: float = 50.0
    rail_latency: float = 2500.0
    rail_message: float = 5.0
    # sm_read and sm_write are the rates with which DeepEP V2 chooses its number of multiprocessors. The sources of
    # the other values are in tables/clusters.
    sm_read: float = 200.0
    sm_write: float = 50.0
    put: float = 50.0
    poll: float = 200.0
    launch: float = 4000.0
    plan_token: float = 0.5

    def __post_init__(self) -> None:
        for f in fields(self):
            value, rate = getattr(self, f.name), f.name in RATES
            require(not isinstance(value, bool), "Hardware", f.name, value, "a number")
            low, unit = (1e-6, "GB/s") if rate else (0.0, "ns")
            found = number("Hardware", f.name, value, low)
            require(found <= 1e9, "Hardware", f.name, value, f"at most 1e9 {unit}")
            object.__setattr__(self, f.name, found)


@dataclass(frozen=True)
class Step:
    """Result of one simulated dispatch and combine.

    Attributes
    ----------
    dispatch_us, combine_us : array float64 [ranks]
        Time of each rank in the call.
    total_us : float
        From the start of the first rank to the end of the last.
    stats : list of dict, by rank
        As Buffer.stats().
    links : list of dict, by rank
        As Cluster.links(): bytes that crossed the links, and picoseconds that they were busy.
    """

    dispatch_us: np.ndarray
    combine_us: np.ndarray
    total_us: float
    stats: list[Any]
    links: list[Any]


class Cluster:
    """A simulated world of `size` ranks with one Buffer each.

    Parameters
    ----------
    size, ranks_per_node : int
        Number of ranks, and of ranks per node. Default: one node.
    hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels
        As for Buffer. Default of channels: one per multiprocessor.
    hardware : Hardware
    payload : bool
        Move real rows. Without payload only times and counts are valid.
    decode : bool
        Make the decode path as well.
    schedule : "roles", "lane" or "groups"
        How a rank runs dispatch and combine. "roles": every role of every channel concurrently. "lane": one role
        after another, as the cpu world does (decode too). "groups": as the warps of the cuda world do.
    arena_bytes : int, optional
        As for Buffer.
    placement : moecomm.balance.Placement, optional
        Experts are the slots of this placement. Dispatches may choose replicas, in its first layer, from the picks of
        all ranks.

    Raises
    ------
    InvalidArgument
        An argument is out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        ranks_per_node: int | None = None,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        num_sms: int = 20,
        channels: int | None = None,
        hardware: Any = Hardware(),
        payload: Any = False,
        decode: Any = False,
        schedule: str = "roles",
        arena_bytes: int | None = None,
        placement: Any = None,
    ) -> None:
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
                f"Cluster: placement is {placement}; "
                f"expected a Placement of {size} ranks and num_experts = {num_experts} slots",
                op="Cluster",
            )
        self.placement, self.logical_experts = placement, placement.num_experts if placement else 0
        arena_bytes = arena_bytes or arena_size(size, hidden, num_experts, top_k, max_tokens, dtype)
        self.native = native.Cluster(
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
        self.row_bytes = hidden * dtype.itemsize

    # -- programs: sequences of calls ---------------------------------------------------------------

    def program(self) -> Any:
        """Return an empty Program for this cluster."""
        return Program(self)

    def reset(self, seed: int | None = None, lead_ns: float = 0.0) -> None:
        """Reset clock, windows and counters.

        Parameters
        ----------
        seed : int, optional
            Draw at random everything that the Fabric contract leaves open, for example the order of puts.
        lead_ns : float
            Virtual time by which a role may run ahead of the others. 0 follows the clock strictly. Some microseconds
            make the simulation many times faster, and make roles share links in slices of that length.
        """
        self.native.reset(seed, lead_ns)

    def run(self, program: Any) -> Any:
        """Run a Program to its end. The windows keep their contents.

        Returns
        -------
        float64 [calls, ranks, 2]
            Begin and end of each call on each rank, in us of virtual time.

        Raises
        ------
        MoecommError
            A call failed. The text names the call, the rank and, after a deadlock, all waiting roles.
        """
        times = np.empty((len(program), self.size, 2), dtype=np.uint64)
        for call, rank, code, phase, peer, expected, got in self.native.run(program.native, times):
            waiting = "; ".join(describe_waiting(w) for w in self.native.stuck())
            raise MoecommError(
                f"sim: call {call} of rank {rank} ended with {code} in phase {phase} "
                f"(peer {peer}, expected {expected}, got {got})"
                + (f". Deadlock: {waiting}" if waiting else ""),
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
        xs: Any,
        topk_ids: Any,
        topk_weights: Any = None,
        *,
        layout: str = "expert",
        expert_alignment: int = 1,
        capacity: int | None = None,
        scales: Any = None,
        choosing: Any = None,
    ) -> Any:
        """Dispatch on all ranks. Arguments are lists by rank. Needs payload.

        Returns
        -------
        list of reference.Received
            Copies of the rows that each rank received.
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

    def combine(self, rows: Any, *, topk_weights: Any = None, bias: Any = None, num_tokens: Any) -> Any:
        """Combine on all ranks after dispatch(). Arguments are lists by rank. Returns y by rank."""
        ys = [torch.full((t, self.hidden), float("nan"), dtype=self.dtype, device="cpu") for t in num_tokens]
        p = self.program()
        p.combine(rows=rows, topk_weights=topk_weights, bias=bias, ys=ys)
        self.run(p)
        return ys

    def decode_dispatch(
        self, xs: Any, topk_ids: Any, topk_weights: Any = None, *, scales: Any = None, masked: Any = ()
    ) -> Any:
        """Decode dispatch, both phases, on all ranks but dead ones, which the others mask first. Lists by rank."""
        p = self.program()
        p.decode_mask(masked)
        p.decode_dispatch(topk_ids, topk_weights, xs=xs, scales=scales)
        p.decode_hook()
        self.run(p)
        received = []
        for rank in range(self.size):
            address, rows, x, at_scales, counts = self.native.packed(rank)
            experts, columns = self.num_experts // self.size, 0 if scales is None else scales[rank].shape[1]
            per_expert = rows // experts
            received.append(
                DecodeReceived(
                    copy_of(address + x, xs[rank].dtype, experts, per_expert, self.hidden),
                    torch.stack([copy_of(address + s, torch.float32, per_expert, columns) for s in at_scales])
                    if columns
                    else None,
                    copy_of(address + counts, torch.int64, experts),
                )
            )
        return received

    def decode_combine(
        self, rows: Any, topk_weights: Any = None, *, num_tokens: Any, masked: Any = ()
    ) -> Any:
        """Decode combine on all ranks after decode_dispatch(), both phases. Lists by rank. Returns y by rank."""
        ys = [torch.full((t, self.hidden), float("nan"), dtype=self.dtype, device="cpu") for t in num_tokens]
        p = self.program()
        p.decode_combine(topk_weights, rows=rows, ys=ys)
        p.leave_out(masked)
        p.decode_hook()
        p.leave_out(masked)
        self.run(p)
        return ys

    def stats(self) -> Any:
        """Counters of each rank since the last reset(), as in Buffer.stats()."""
        return [self.native.counters(r) for r in range(self.size)]

    def links(self) -> Any:
        """Traffic of each rank since the last reset().

        Returns
        -------
        list of dict, by rank
            "rail" and "node" each have rows, row_bytes, other_bytes and messages. "busy" has picoseconds by link.
        """
        return [self.native.links(r) for r in range(self.size)]

    # -- times of one step --------------------------------------------------------------------------

    def step(
        self, topk_ids: Any, *, quant: str | None = None, layout: str = "expert", lead_ns: int | None = None
    ) -> Any:
        """Simulate one dispatch and combine of this routing; return the Step.

        Parameters
        ----------
        topk_ids : list of int64 Tensor [T, top_k] by rank, or one Tensor [ranks, T, top_k]
        quant : None, "given", "fp8" or "fp8_ue8m0"
            Format of the rows of dispatch. None: the buffer's dtype. "given": already quantized. Otherwise the call
            quantizes them. Combine always sends the buffer's dtype.
        layout : "expert" or "rank"
        lead_ns : float, optional
            As for reset(). Default: depends on the number of tokens.
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

    def decode_step(self, topk_ids: Any, *, quant: Any = "fp8", steps: int = 1, lead_ns: Any = None) -> Any:
        """Simulate decode_dispatch and decode_combine with both receive phases; return the Step.

        Parameters
        ----------
        topk_ids
            As for step().
        quant : "fp8" or None
            Format of the rows of dispatch. Combine sends the buffer's dtype.
        steps : int
            Number of steps without a barrier between them. The result is that of the last one.
        lead_ns : float, optional
            As for reset(). Default: depends on the number of tokens.
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

    def _received(self, rank: int, handle: Any, layout: str, dtype: torch.dtype, scale_columns: int) -> Any:
        address, n, (rows, scales, weights, ids, source) = self.native.block(rank, handle)

        def view(offset: int, dtype: torch.dtype, *shape: Any) -> Any:
            return copy_of(address + offset, dtype, *shape)

        by_rank = layout == "rank"
        origin = view(source, torch.int64, n)
        tokens, padded = self.native.plan(rank, handle)
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


def describe_waiting(w: Any) -> str:
    """Describe a waiting role as text."""
    channel = f"[{w['channel']}]" if w["channel"] >= 0 else ""
    return (
        f"rank {w['rank']} {w['role']}{channel} waits for rank {w['peer']} in phase {w['phase']} "
        f"(counter >= {w['at_least']})"
    )


def _lead(topk_ids: Any, large: Any) -> Any:
    return large if sum(len(ids) for ids in topk_ids) > STRICT_TOKENS else 0.0
