"""Launch plans: a pure function of hardware and traffic, and tables of measured plans that override it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path

TABLES = Path(__file__).parents[1] / "tables"
_WARP_BYTES = 2304  # upper bound of the shared memory that a warp needs in addition to its stages
_MAX_STAGES = 4
_MAX_WARPS = 12
_CHUNKS = (
    4  # minimum number of chunks of a channel's rows to a node: one is sent while the one before is forwarded
)


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links. Bandwidths are in GB/s in one direction, and shared memory is in bytes."""

    name: str
    sms: int
    shared_bytes: int
    memory: float  # device memory, read plus written
    node_link: float  # to other GPUs of the node
    rail_link: float  # to other nodes
    sm_read: float = 100.0  # by one multiprocessor
    sm_write: float = 50.0
    sm_gather: float = (
        35.0  # reading peers' rows to sum them: 48 KB in flight, over a link with 1.4 us latency
    )


@dataclass(frozen=True)
class Traffic:
    """The traffic of a call: sizes of the layer, numbers of ranks and nodes, and bytes of a row."""

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    ranks: int
    ranks_per_node: int
    row_bytes: int
    groups: int = 1  # the gate picks experts in `top_groups` of these groups
    top_groups: int = 1
    shared_gpu: int = 1  # number of ranks that share a GPU

    @property
    def nodes(self) -> Any:
        """Number of nodes."""
        return self.ranks // self.ranks_per_node


@dataclass(frozen=True)
class Plan:
    """A launch plan: how a call uses a GPU.

    .num_sms: multiprocessors. .warps: warps on each. .channels: slices of the tokens. .senders: warps that send before
    they forward; 0: all. .stages, .stage_bytes: buffers through which a warp copies rows. .chunk_bytes: bytes of rows
    that cross the rail with one signal.
    """

    num_sms: int
    warps: int
    channels: int
    senders: int
    stage_bytes: int
    stages: int = 3
    chunk_bytes: int = 1 << 18

    def spread(self) -> Any:
        """Return the numbers that all kernels need: (sms, warps, senders, stage bytes)."""
        return self.num_sms, self.warps, self.senders, self.stage_bytes


def with_channels(plan: Plan, channels: int) -> Plan:
    """Return the plan with another number of channels."""
    return replace(plan, channels=channels)


HARDWARE = {
    "NVIDIA H200": Hardware("NVIDIA H200", 132, 232448, 4300.0, 450.0, 50.0),
    "NVIDIA H100 80GB HBM3": Hardware("NVIDIA H100 80GB HBM3", 132, 232448, 3000.0, 450.0, 50.0),
    "NVIDIA H800": Hardware("NVIDIA H800", 132, 232448, 3000.0, 160.0, 50.0),
    "NVIDIA A100-SXM4-80GB": Hardware("NVIDIA A100-SXM4-80GB", 108, 166912, 1900.0, 300.0, 25.0),
}


def expected_parts(parts: Any, num_experts: int, top_k: int, groups: Any = 1, top_groups: int = 1) -> Any:
    """Return the average number of parts (nodes or ranks) that own an expert of a token.

    Each of `parts` parts has the same number of experts. The gate picks top_k distinct experts, uniformly within
    top_groups of `groups` uniformly chosen groups. The result is exact if a group is in one part, or has whole parts.

    Raises
    ------
    ValueError
        A size is not positive, or top_k is larger than the number of experts in top_groups groups.
    """
    if (
        min(parts, num_experts, top_k, groups, top_groups) < 1
        or top_groups > groups
        or top_k * groups > num_experts * top_groups
    ):
        raise ValueError(
            f"top_k is {top_k} with {num_experts} experts and {parts} parts; expected 1 <= top_k <= experts in "
            f"{top_groups} of {groups} groups"
        )

    def missed(
        total: int, own: int, picks: int
    ) -> Any:  # probability of no pick among `own` of `total` experts
        return comb(total - own, picks) / comb(total, picks)

    if groups == 1:
        return parts * (1 - missed(num_experts, num_experts // parts, top_k))
    per_group, open_experts = num_experts // groups, num_experts * top_groups // groups
    if parts >= groups:  # a part is in one group
        return parts * top_groups / groups * (1 - missed(open_experts, num_experts // parts, top_k))
    per_part = groups // parts  # a part has whole groups: sum over the number of its chosen groups
    hit = sum(
        comb(per_part, n)
        * comb(groups - per_part, top_groups - n)
        / comb(groups, top_groups)
        * (1 - missed(open_experts, n * per_group, top_k))
        for n in range(1, min(per_part, top_groups) + 1)
    )
    return parts * hit


def traffic_per_token(t: Any) -> Any:
    """Return the average number of rows per token of one rank: a dict of rail, node, read, written.

    rail: to other nodes. node: from gateways to ranks of their nodes. read, written: through the multiprocessors of a
    rank in dispatch. A row is read once to be sent and once by each gateway; it is written once per rank, and once for
    every further pick.
    """
    nodes = expected_parts(t.nodes, t.num_experts, t.top_k, t.groups, t.top_groups)
    ranks = expected_parts(t.ranks, t.num_experts, t.top_k, t.groups, t.top_groups)
    own = nodes / t.nodes
    rail = nodes - own
    copies = t.top_k - ranks
    return {"rail": rail, "node": ranks, "read": rail + nodes + copies, "written": rail + ranks + copies}


def fits(hardware: Any, warps: int, stage_bytes: int, stages: int = 3) -> bool:
    """Whether the stages of these warps fit in the shared memory of a multiprocessor."""
    return bool(warps * (_WARP_BYTES + stages * stage_bytes) <= hardware.shared_bytes)


def choose_plan(hardware: Any, traffic: Any, num_sms: int | None = None) -> Any:
    """Return the launch plan for dispatch and combine with this traffic on this GPU.

    Parameters
    ----------
    hardware : Hardware
    traffic : Traffic
    num_sms : int, optional
        From the user. None: the number that the slowest link can use, plus a quarter, rounded up to an even number, and
        at most an equal share of the GPU for each of its ranks.

    Returns
    -------
    Plan
    """
    rows = traffic_per_token(traffic)
    share = max(2, hardware.sms // traffic.shared_gpu // 2 * 2)
    if num_sms is None:
        # Rows per second that the links allow; the multiprocessors must read and write at this rate.
        limits = [hardware.memory / traffic.shared_gpu / (rows["read"] + rows["written"])]
        if traffic.nodes > 1:
            limits.append(hardware.rail_link / rows["rail"])
        if traffic.ranks_per_node > traffic.shared_gpu:
            limits.append(hardware.node_link / rows["node"])
        rate = min(limits)
        wanted = 1.25 * max(
            rate * rows["read"] / hardware.sm_read,
            rate * rows["written"] / hardware.sm_write,
            rate * (rows["node"] + rows["rail"]) / hardware.sm_gather,  # in combine
        )
        num_sms = min(share, max(2, 2 * -(-int(wanted + 0.999) // 2)))
    warps = min(_MAX_WARPS, max(4, hardware.shared_bytes // (_WARP_BYTES + 3 * 2048)))
    room = hardware.shared_bytes // warps - _WARP_BYTES
    # Divide a row into the smallest number of equal pieces that fit in three stages, in multiples of 128 bytes. A
    # fourth stage, if it fits, allows one more load in flight.
    largest = room // 3 // 128 * 128
    pieces = -(-traffic.row_bytes // largest)
    stage_bytes = -(-traffic.row_bytes // pieces // 128) * 128
    stage_bytes = min(largest, max(1024, stage_bytes))
    stages = min(_MAX_STAGES, room // stage_bytes)
    workers = num_sms * warps - 1
    if traffic.nodes == 1:
        senders = 0
    else:  # rows that this node's ranks send and forward, and rows of other nodes that they forward
        own, other = (
            rows["rail"] + rows["node"] / traffic.nodes,
            rows["node"] * (traffic.nodes - 1) / traffic.nodes,
        )
        senders = min(workers - 1, max(1, round(workers * own / (own + other))))
    channels = max(1, min(1024, senders or workers, -(-traffic.max_tokens // 4)))
    return Plan(
        num_sms,
        warps,
        channels,
        senders,
        stage_bytes,
        stages,
        _chunk_bytes(hardware, traffic, rows["rail"], channels),
    )


def _chunk_bytes(hardware: Any, traffic: Any, rail_rows: Any, channels: int) -> Any:
    """Return the bytes that the rail carries in a microsecond, about the cost of a signal, in whole rows.

    The result is smaller if a channel has few rows.
    """
    if traffic.nodes == 1:
        return Plan.chunk_bytes
    to_a_node = traffic.max_tokens * rail_rows / (traffic.nodes - 1) / channels  # rows of one channel
    rows = max(1, min(round(1e3 * hardware.rail_link / traffic.row_bytes), int(to_a_node / _CHUNKS)))
    return rows * traffic.row_bytes


def load_table(name: str) -> Any:
    """Return {key: Plan} from the table of a GPU of this name, or {} if there is no table.

    Keys are results of key_of.
    """
    path = TABLES / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        return {}
    return {key: Plan(**plan) for key, plan in json.loads(path.read_text()).items()}


def save_table(name: str, plans: Any, folder: Any = TABLES) -> Any:
    """Write {key: Plan} as the table of a GPU of this name. Return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '_')}.json"
    path.write_text(json.dumps({key: asdict(plan) for key, plan in sorted(plans.items())}, indent=1) + "\n")
    return path


def key_of(traffic: Any, num_sms: int) -> str:
    """Return the key of the plan for this traffic in a table."""
    nodes = f"{traffic.nodes}x{traffic.ranks_per_node}"
    return f"{nodes} hidden {traffic.hidden} row {traffic.row_bytes} top {traffic.top_k} sms {num_sms}"


_override = None


@contextlib.contextmanager
def overriding(choose: Any) -> Iterator[Any]:
    """Context in which plan_for returns choose(hardware, traffic). For measurements."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before


def plan_for(hardware: Any, traffic: Any, num_sms: int | None = None, table: Any = None) -> Any:
    """Return the plan of the table if it has one for this traffic, else that of choose_plan."""
    if _override is not None:
        return _override(hardware, traffic)
    chosen = choose_plan(hardware, traffic, num_sms)
    found = (load_table(hardware.name) if table is None else table).get(key_of(traffic, chosen.num_sms))
    return chosen if found is None else found


def domain_plan(hardware: Any, num_sms: int) -> Any:
    """Return the launch plan of the verbs of a Domain: every warp is a channel, with stages for long rows."""
    warps, stages = 4, 3
    room = (hardware.shared_bytes // warps - _WARP_BYTES) // stages // 128 * 128
    return Plan(
        num_sms=min(num_sms, hardware.sms),
        warps=warps,
        channels=warps * num_sms,
        senders=0,
        stage_bytes=min(16384, room),
        stages=stages,
    )


def hardware_of(name: str, sms: int, shared_bytes: Any) -> Any:
    """Return the Hardware of a GPU: known or cautiously guessed bandwidths, with the sizes that the device reports."""
    known = HARDWARE.get(name, Hardware(name, sms, shared_bytes, 1500.0, 25.0, 25.0))
    return replace(known, sms=sms, shared_bytes=shared_bytes)
