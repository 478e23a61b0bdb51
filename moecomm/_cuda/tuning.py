"""How a call is spread over a GPU: a pure function from the hardware and the traffic, and measured tables that override it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path

TABLES = Path(__file__).parents[1] / "tables"
_WARP_BYTES = 2304  # of shared memory beside its stages; an upper bound of the kernels' own count
_MAX_STAGES = 4
_MAX_WARPS = 12
_CHUNKS = 4  # of a channel's rows to a node, at least: while one crosses, the one before is forwarded


@dataclass(frozen=True)
class Hardware:
    """A GPU and its links. Bandwidths in GB/s, one direction; shared memory in bytes."""

    name: str
    sms: int
    shared_bytes: int
    memory: float  # device memory, read plus written
    node_link: float  # to other GPUs of the node
    rail_link: float  # to other nodes
    sm_read: float = 100.0  # what one multiprocessor moves
    sm_write: float = 50.0


@dataclass(frozen=True)
class Traffic:
    """What a call moves: sizes of a layer, how its ranks are laid out, and the kernels' bytes per row."""

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    ranks: int
    ranks_per_node: int
    row_bytes: int
    groups: int = 1  # the gate picks its experts within `top_groups` of these groups
    top_groups: int = 1
    shared_gpu: int = 1  # ranks that share a GPU

    @property
    def nodes(self):
        """Nodes of the world."""
        return self.ranks // self.ranks_per_node


@dataclass(frozen=True)
class Plan:
    """How a call is spread over a GPU.

    num_sms multiprocessors with `warps` warps on each; `senders` of these send before they forward (0: all); tokens in
    `channels` slices; a warp copies through `stages` stages of stage_bytes; chunk_bytes of rows cross the rail under one signal.
    """

    num_sms: int
    warps: int
    channels: int
    senders: int
    stage_bytes: int
    stages: int = 3
    chunk_bytes: int = 1 << 18

    def spread(self):
        """The numbers that all kernels take: (sms, warps, senders, stage bytes)."""
        return self.num_sms, self.warps, self.senders, self.stage_bytes


HARDWARE = {
    "NVIDIA H200": Hardware("NVIDIA H200", 132, 232448, 4300.0, 450.0, 50.0),
    "NVIDIA H100 80GB HBM3": Hardware("NVIDIA H100 80GB HBM3", 132, 232448, 3000.0, 450.0, 50.0),
    "NVIDIA H800": Hardware("NVIDIA H800", 132, 232448, 3000.0, 160.0, 50.0),
    "NVIDIA A100-SXM4-80GB": Hardware("NVIDIA A100-SXM4-80GB", 108, 166912, 1900.0, 300.0, 25.0),
}


def expected_parts(parts, num_experts, top_k, groups=1, top_groups=1):
    """Parts (nodes or ranks) that hold an expert of a token, on average.

    The experts lie in `parts` equal parts; the gate picks top_k distinct ones, uniformly within top_groups of
    `groups` uniformly chosen groups. Where a group lies within one part, or holds whole parts, that is exact.

    Raises
    ------
    ValueError
        A size is not positive, or the picks do not fit.
    """
    if (
        min(parts, num_experts, top_k, groups, top_groups) < 1
        or top_groups > groups
        or top_k * groups > num_experts * top_groups
    ):
        raise ValueError(
            f"expected 1 <= top_k <= experts in {top_groups} of {groups} groups; got top_k {top_k}, {num_experts} experts, {parts} parts"
        )

    def missed(total, own, picks):  # no pick among `own` of `total`
        return comb(total - own, picks) / comb(total, picks)

    if groups == 1:
        return parts * (1 - missed(num_experts, num_experts // parts, top_k))
    per_group, open_experts = num_experts // groups, num_experts * top_groups // groups
    if parts >= groups:  # a part lies within one group
        return parts * top_groups / groups * (1 - missed(open_experts, num_experts // parts, top_k))
    per_part = groups // parts  # a part holds whole groups: how many of its groups are open
    hit = sum(
        comb(per_part, n)
        * comb(groups - per_part, top_groups - n)
        / comb(groups, top_groups)
        * (1 - missed(open_experts, n * per_group, top_k))
        for n in range(1, min(per_part, top_groups) + 1)
    )
    return parts * hit


def traffic_per_token(t):
    """Rows per token of one rank, on average: dict of rail (to other nodes), node (to ranks of the gateways' nodes), read, written.

    Read and written count what a rank's kernels move through its multiprocessors, for dispatch: a row is read once to
    be sent, once by each gateway, and written once per rank and once more per further pick.
    """
    nodes = expected_parts(t.nodes, t.num_experts, t.top_k, t.groups, t.top_groups)
    ranks = expected_parts(t.ranks, t.num_experts, t.top_k, t.groups, t.top_groups)
    own = nodes / t.nodes
    rail = nodes - own
    copies = t.top_k - ranks
    return {"rail": rail, "node": ranks, "read": rail + nodes + copies, "written": rail + ranks + copies}


def fits(hardware, warps, stage_bytes, stages=3):
    """Whether these warps with their stages have room in a multiprocessor's shared memory."""
    return warps * (_WARP_BYTES + stages * stage_bytes) <= hardware.shared_bytes


def choose_plan(hardware, traffic, num_sms=None):
    """How to spread dispatch and combine of this traffic over this GPU.

    Parameters
    ----------
    hardware : Hardware
    traffic : Traffic
    num_sms : int, optional
        Given by the user: everything else follows from it. None: as many as the slowest link can use, a quarter
        more, an even number, at most what the ranks on this GPU leave to each.

    Returns
    -------
    Plan
    """
    rows = traffic_per_token(traffic)
    share = max(2, hardware.sms // traffic.shared_gpu // 2 * 2)
    if num_sms is None:
        # Rows per second that the links let through; the multiprocessors must keep up with reading and writing.
        limits = [hardware.memory / traffic.shared_gpu / (rows["read"] + rows["written"])]
        if traffic.nodes > 1:
            limits.append(hardware.rail_link / rows["rail"])
        if traffic.ranks_per_node > traffic.shared_gpu:
            limits.append(hardware.node_link / rows["node"])
        rate = min(limits)
        wanted = 1.25 * max(
            rate * rows["read"] / hardware.sm_read, rate * rows["written"] / hardware.sm_write
        )
        num_sms = min(share, max(2, 2 * -(-int(wanted + 0.999) // 2)))
    warps = min(_MAX_WARPS, max(4, hardware.shared_bytes // (_WARP_BYTES + 3 * 2048)))
    room = hardware.shared_bytes // warps - _WARP_BYTES
    # A row in as few equal pieces as three stages have room for: whole 128 bytes. A fourth where there is room: one more load is under way.
    largest = room // 3 // 128 * 128
    pieces = -(-traffic.row_bytes // largest)
    stage_bytes = -(-traffic.row_bytes // pieces // 128) * 128
    stage_bytes = min(largest, max(1024, stage_bytes))
    stages = min(_MAX_STAGES, room // stage_bytes)
    workers = num_sms * warps - 1
    if traffic.nodes == 1:
        senders = 0
    else:  # sending and forwarding rows of this rank's node, against forwarding those of other nodes
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


def _chunk_bytes(hardware, traffic, rail_rows, channels):
    """What the rail carries in a microsecond, about what a signal costs, in whole rows; fewer where a channel has few rows."""
    if traffic.nodes == 1:
        return Plan.chunk_bytes
    to_a_node = traffic.max_tokens * rail_rows / (traffic.nodes - 1) / channels  # rows of a channel
    rows = max(1, min(round(1e3 * hardware.rail_link / traffic.row_bytes), int(to_a_node / _CHUNKS)))
    return rows * traffic.row_bytes


def load_table(name):
    """{key: Plan} of the table file for a GPU of this name; empty where there is none.

    A key is what `key_of` makes of a Traffic and a number of multiprocessors.
    """
    path = TABLES / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        return {}
    return {key: Plan(**plan) for key, plan in json.loads(path.read_text()).items()}


def save_table(name, plans, folder=TABLES):
    """Write {key: Plan} as the table of a GPU of this name; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '_')}.json"
    path.write_text(json.dumps({key: asdict(plan) for key, plan in sorted(plans.items())}, indent=1) + "\n")
    return path


def key_of(traffic, num_sms):
    """Under which name a table keeps the plan for this traffic."""
    return f"{traffic.nodes}x{traffic.ranks_per_node} hidden {traffic.hidden} row {traffic.row_bytes} top {traffic.top_k} sms {num_sms}"


_override = None


@contextlib.contextmanager
def overriding(choose):
    """For measurements: meanwhile plans are choose(hardware, traffic)."""
    global _override
    before, _override = _override, choose
    try:
        yield
    finally:
        _override = before


def plan_for(hardware, traffic, num_sms=None, table=None):
    """The table's plan where it has one, else choose_plan's."""
    if _override is not None:
        return _override(hardware, traffic)
    chosen = choose_plan(hardware, traffic, num_sms)
    found = (load_table(hardware.name) if table is None else table).get(key_of(traffic, chosen.num_sms))
    return chosen if found is None else found


def hardware_of(name, sms, shared_bytes):
    """The known GPU of this name with what the device itself says, or a cautious guess for an unknown one."""
    known = HARDWARE.get(name, Hardware(name, sms, shared_bytes, 1500.0, 25.0, 25.0))
    return replace(known, sms=sms, shared_bytes=shared_bytes)
