"""Placement: which expert each slot of each rank holds. rebalance computes a placement from the load."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .._native import balance as native
from ..checks import MOST_EXPERTS, flag, integer, integers, reals, require
from ..elastic.renewed import set_placement_type
from ..errors import InvalidArgument
from .budget import Paid, within_budget
from .migration import Migrating, migrate
from .replicas import ReplicaRouter

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..communicator import Communicator


@dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert each slot holds, in all layers. Immutable, and equal on all ranks.

    Attributes
    ----------
    physical_to_logical : Tensor int64 [L, P]
        The logical expert of each slot.
    logical_to_physical : Tensor int64 [L, E, X]
        The slots of each logical expert, ascending, then -1.
    replica_count : Tensor int64 [L, E]
        Number of slots of each logical expert.
    num_experts, num_ranks, num_nodes : int
    version : int
        Each new placement has the version of the previous one plus 1.
    moves : Tensor int64 [M, 4]
        Changes against the previous placement: (layer, slot, logical expert that it gets, slot that had it before).
        That slot is in the same node if possible.
    partial : bool
        Logical experts may have no slot, because their ranks were lost.
    paid : Paid or None
        Costs of the moves, if rebalance was given a budget.

    Raises
    ------
    InvalidArgument
        A slot holds an expert that does not exist, an expert has no slot, a rank holds an expert twice, or an
        argument has the wrong type.

    Source: DeepSeek-V3 technical report, sections 3.4.1 and 3.4.2 (redundant experts).
    """

    physical_to_logical: torch.Tensor
    num_experts: int
    num_ranks: int
    num_nodes: int = 1
    version: int = 0
    previous: InitVar[Placement | None] = None
    partial: bool = False
    paid: Paid | None = field(default=None, repr=False, compare=False)
    logical_to_physical: torch.Tensor = field(init=False, repr=False)
    replica_count: torch.Tensor = field(init=False, repr=False)
    moves: torch.Tensor = field(init=False, repr=False)
    # Buffer takes the router class from its placement, so it need not import this package.
    router_type: ClassVar[type[ReplicaRouter]] = ReplicaRouter

    def __post_init__(self, previous: Placement | None) -> None:
        op = "Placement"
        table = torch.from_numpy(integers(op, "physical_to_logical", self.physical_to_logical).copy())
        require(
            table.dim() == 2 and table.numel() > 0,
            op,
            "physical_to_logical",
            list(table.shape),
            "a table [layers, slots]",
        )
        layers, slots = table.shape
        for name, low, high in (
            ("num_experts", 1, MOST_EXPERTS),
            ("num_ranks", 1, slots),
            ("num_nodes", 1, slots),
            ("version", 0, (1 << 63) - 1),
        ):
            object.__setattr__(self, name, integer(op, name, getattr(self, name), low, high))
        object.__setattr__(self, "partial", flag(op, "partial", self.partial))
        require(
            previous is None or isinstance(previous, Placement),
            op,
            "previous",
            previous,
            "a Placement, or None",
        )
        require(
            slots % self.num_ranks == 0, op, "num_ranks", self.num_ranks, f"a divisor of the {slots} slots"
        )
        require(
            self.num_ranks % self.num_nodes == 0,
            op,
            "num_nodes",
            self.num_nodes,
            f"a divisor of the {self.num_ranks} ranks",
        )
        bad = (table < 0) | (table >= self.num_experts)
        require(
            not bad.any(),
            op,
            "physical_to_logical",
            table[bad][:1].tolist(),
            f"experts in [0, {self.num_experts})",
        )
        sets = table.view(layers, self.num_ranks, -1).sort(-1).values
        twice = sets[..., 1:] == sets[..., :-1]
        require(
            not twice.any(),
            op,
            "physical_to_logical",
            twice.nonzero()[:1].tolist(),
            "no expert twice on one rank (layer, rank, ...)",
        )
        count = torch.zeros((layers, self.num_experts), dtype=torch.int64, device="cpu").scatter_add_(
            1, table, torch.ones_like(table)
        )
        require(
            self.partial or bool((count > 0).all()),
            op,
            "physical_to_logical",
            (count == 0).nonzero()[:1].tolist(),
            "a slot for every (layer, expert)",
        )
        by_expert = table.argsort(dim=1, stable=True)
        first = count.cumsum(1) - count
        ordinal = torch.arange(slots, dtype=torch.int64, device="cpu") - first.gather(
            1, table.gather(1, by_expert)
        )
        replicas = torch.full(
            (layers, self.num_experts, int(count.max())), -1, dtype=torch.int64, device="cpu"
        )
        layer = torch.arange(layers, dtype=torch.int64, device="cpu")[:, None].expand(layers, slots)
        replicas[layer, table.gather(1, by_expert), ordinal] = by_expert
        for name, value in (
            ("physical_to_logical", table),
            ("replica_count", count),
            ("logical_to_physical", replicas),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "moves", self._moves(previous))

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """Number of slots over all ranks, P."""
        return self.physical_to_logical.shape[1]

    @property
    def slots_per_rank(self) -> int:
        """Number of slots of one rank."""
        return self.num_slots // self.num_ranks

    @property
    def digest(self) -> str:
        """Short string of the version and a checksum of the table, to compare placements across ranks."""
        return f"{self.version}-{zlib.crc32(self.physical_to_logical.numpy().tobytes()):08x}"

    def rank_load(self, load: ArrayLike) -> torch.Tensor:
        """Return the load of each rank if the load of each expert is split evenly over its replicas.

        Parameters
        ----------
        load : array [L, E]

        Returns
        -------
        Tensor float64 [L, ranks]

        Raises
        ------
        InvalidArgument
            load has another shape or is not an array of numbers.
        """
        load = torch.from_numpy(reals("rank_load", "load", load))
        require(
            load.shape == self.replica_count.shape,
            "rank_load",
            "load",
            list(load.shape),
            f"[L, E] = {list(self.replica_count.shape)}",
        )
        share = (load / self.replica_count).gather(1, self.physical_to_logical)
        return share.view(self.num_layers, self.num_ranks, -1).sum(-1)

    def balancedness(self, load: ArrayLike) -> float:
        """Return mean rank load / max rank load, averaged over layers: 1.0 at best, and for a layer without load.

        Parameters
        ----------
        load : array [L, E]
        """
        load = torch.from_numpy(finite_load("balancedness", "load", load))
        largest = load.max(1, keepdim=True).values if load.dim() == 2 and load.numel() else load
        # Scaled to a maximum of 1, so that no sum overflows and no quotient underflows.
        rank = self.rank_load(load / torch.where(largest > 0, largest, 1.0))
        highest = rank.max(1).values
        return float(
            torch.where(highest > 0, rank.mean(1) / torch.where(highest > 0, highest, 1.0), 1.0).mean()
        )

    def surviving(self, alive: Sequence[int], *, num_nodes: int = 1) -> Placement:
        """Return this placement restricted to the surviving ranks, which are renumbered in ascending order.

        Survivors keep their slots. The result is partial: its .replica_count is 0 for experts that no survivor holds.

        Parameters
        ----------
        alive : sequence of int
            Ranks of this placement that survive.
        num_nodes : int
            Number of nodes of the surviving ranks.

        Returns
        -------
        Placement

        Raises
        ------
        InvalidArgument
            alive is empty or contains a rank that does not exist.
        """
        ranks = integers(
            "surviving", "alive", sorted(alive) if isinstance(alive, (set, frozenset, range)) else alive
        )
        alive = sorted(set(ranks.reshape(-1).tolist()))
        require(
            ranks.ndim == 1 and alive and 0 <= alive[0] and alive[-1] < self.num_ranks,
            "surviving",
            "alive",
            alive,
            f"a list with at least one rank, all in 0..{self.num_ranks - 1}",
        )
        table = self.physical_to_logical.view(self.num_layers, self.num_ranks, -1)[:, alive].reshape(
            self.num_layers, -1
        )
        return Placement(table, self.num_experts, len(alive), num_nodes, self.version, partial=True)

    def migrate(self, weights: Sequence[Any], comm: Communicator) -> Migrating:
        """Call moecomm.balance.migrate(self, weights, comm). Collective.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            As moecomm.balance.migrate.
        """
        return migrate(self, weights, comm)

    def _moves(self, before: Placement | None) -> torch.Tensor:
        if before is None:
            return torch.zeros((0, 4), dtype=torch.int64, device="cpu")
        same = (
            before.physical_to_logical.shape == self.physical_to_logical.shape
            and before.num_ranks == self.num_ranks
        )
        require(
            same and before.num_experts == self.num_experts,
            "Placement",
            "previous",
            before,
            "a placement of the same layers, slots, experts and ranks",
        )
        changed = (before.physical_to_logical != self.physical_to_logical).nonzero()
        layer, slot = changed.T
        expert = self.physical_to_logical[layer, slot]
        # Prefer sources in the same node, and rotate over them.
        sources = before.logical_to_physical[layer, expert]
        per_node = self.num_slots // self.num_nodes
        far = (sources // per_node != (slot // per_node)[:, None]).long() + 2 * (sources < 0)
        nearest = far == far.min(1, keepdim=True).values
        turn = (slot % nearest.sum(1).clamp_min(1))[:, None]
        chosen = ((nearest.cumsum(1) - 1 == turn) & nearest).long().argmax(1, keepdim=True)
        return torch.stack([layer, slot, expert, sources.gather(1, chosen).flatten()], 1)


set_placement_type(Placement)


def finite_load(op: str, name: str, load: ArrayLike) -> np.ndarray:
    """Loads as a float64 array on the host. Refuses negative numbers, NaN and infinity."""
    found: np.ndarray = reals(op, name, load)
    wrong = ~(np.isfinite(found) & (found >= 0))
    require(not wrong.any(), op, name, float(found[wrong][0]) if wrong.any() else 0.0, "finite numbers >= 0")
    return found


def rebalance(
    load: ArrayLike,
    *,
    num_replicas: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_ranks: int,
    previous: Placement | None = None,
    max_moves: int | None = None,
    connected: bool = False,
    bytes_per_expert: int | Sequence[int] | None = None,
    budget: int | None = None,
) -> Placement:
    """Compute a placement that balances this load over the ranks. Deterministic; releases the GIL.

    Parameters
    ----------
    load : array or Tensor [L, E]
        Tokens, or any measure >= 0, per layer and logical expert.
    num_replicas : int
        Number of slots P per layer over all ranks: a multiple of num_ranks, and at least the number of experts.
    num_groups : int
        Consecutive experts form groups. All replicas of a group are in one node, as node-limited routing requires.
        1: no such restriction.
    num_nodes, num_ranks : int
        num_nodes must divide num_ranks and, if num_groups > 1, num_groups.
    previous : Placement, optional
        The current placement. Ranks are relabeled so that most replicas stay. .moves of the result lists the changes.
    max_moves : int, optional
        Limit of the slots that change per rank and layer. Needs previous. Groups then stay in their nodes.
    connected : bool
        Distribute the replicated experts so that they connect all ranks (with groups: all ranks of a node). Then the
        split at run time (replicas="optimal") can move load from any rank to any other. Needs three slots per rank.
    bytes_per_expert : int, or a sequence of L ints, optional
        Bytes of the weights of one expert. Needs previous and budget.
    budget : int, optional
        Limit of the bytes that the migration moves over all links and layers. .paid of the result contains its costs
        and the balance that it reaches.

    Returns
    -------
    Placement

    Raises
    ------
    InvalidArgument
        A shape or number does not fit, or load contains a negative number, NaN or infinity.

    Source: DeepSeek-V3 technical report, section 3.4.1 (rebalancing from online statistics).
    """
    op = "rebalance"
    load = finite_load(op, "load", load)
    require(load.ndim == 2 and load.size > 0, op, "load", list(load.shape), "[layers, experts]")
    experts = load.shape[1]
    require(experts <= MOST_EXPERTS, op, "load", list(load.shape), f"at most {MOST_EXPERTS} experts")
    num_replicas, num_groups, num_nodes, num_ranks = (
        integer(op, name, value, 1, MOST_EXPERTS)
        for name, value in dict(
            num_replicas=num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_ranks=num_ranks
        ).items()
    )
    connected = flag(op, "connected", connected)
    require(num_ranks % num_nodes == 0, op, "num_nodes", num_nodes, f"a divisor of the {num_ranks} ranks")
    require(experts % num_groups == 0, op, "num_groups", num_groups, f"a divisor of the {experts} experts")
    require(
        num_groups == 1 or num_groups % num_nodes == 0,
        op,
        "num_groups",
        num_groups,
        f"1 or a multiple of the {num_nodes} nodes",
    )
    parts = num_nodes if num_groups > 1 else 1
    most = min(MOST_EXPERTS, experts // parts * (num_ranks // parts) * parts)
    require(
        num_replicas % num_ranks == 0 and experts <= num_replicas <= most,
        op,
        "num_replicas",
        num_replicas,
        f"a multiple of the {num_ranks} ranks in {experts}..{most} (no rank holds an expert twice)",
    )
    before = None
    if previous is not None:
        fits = (
            isinstance(previous, Placement)
            and previous.physical_to_logical.shape == (load.shape[0], num_replicas)
            and previous.num_experts == experts
            and previous.num_ranks == num_ranks
        )
        require(
            fits,
            op,
            "previous",
            previous,
            f"a Placement of {load.shape[0]} layers, {experts} experts, {num_replicas} slots, {num_ranks} ranks",
        )
        if parts > 1:
            node_of = previous.logical_to_physical // (num_replicas // num_nodes)
            first_node = node_of[:, :, :1].reshape(load.shape[0], num_groups, -1)
            together = (first_node == first_node[..., :1]).all() and (
                (node_of == node_of[:, :, :1]) | (previous.logical_to_physical < 0)
            ).all()
            require(
                bool(together), op, "previous", previous, "a placement that keeps every group in one node"
            )
        before = np.ascontiguousarray(previous.physical_to_logical.numpy(), dtype=np.int32)
    if max_moves is not None:
        require(previous is not None, op, "max_moves", max_moves, "None, because previous is None")
        max_moves = integer(op, "max_moves", max_moves, 0)
    version = 0 if previous is None else previous.version + 1

    def solve(limit: int | None) -> Placement:
        out = np.empty((load.shape[0], num_replicas), dtype=np.int32)
        native.rebalance(
            load, out, num_groups, num_nodes, num_ranks, before, -1 if limit is None else limit, connected
        )
        return Placement(torch.from_numpy(out), experts, num_ranks, num_nodes, version, previous)

    if budget is None and bytes_per_expert is None:
        return solve(max_moves)
    if previous is None:
        raise InvalidArgument(
            f"{op}: previous is None; expected a Placement, because a budget is given", op=op
        )
    budget = integer(op, "budget", budget, 0, (1 << 62) - 1)
    sizes = sizes_of(op, bytes_per_expert, load.shape[0])
    table, paid = within_budget(torch.from_numpy(load), previous, solve, sizes, budget, max_moves)
    return Placement(table, experts, num_ranks, num_nodes, version, previous, paid=paid)


def sizes_of(op: str, bytes_per_expert: Any, layers: int) -> list[int]:
    """Bytes of one expert in each layer."""
    if isinstance(bytes_per_expert, (list, tuple)):
        require(
            len(bytes_per_expert) == layers,
            op,
            "bytes_per_expert",
            bytes_per_expert,
            f"one int per layer, {layers}",
        )
        return [integer(op, "bytes_per_expert", n, 0, 1 << 48) for n in bytes_per_expert]
    return [integer(op, "bytes_per_expert", bytes_per_expert, 0, 1 << 48)] * layers
