"""Placement: which expert every slot of every rank holds, and the static plan that finds a good one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .._native import balance as native
from ..checks import MOST_EXPERTS, flag, integer, integers, reals, require
from .migration import Migrating, migrate
from .replicas import ReplicaRouter

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..communicator import Communicator


@dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert every slot holds, for all layers. Immutable; equal on every rank.

    physical_to_logical int64 [L, P]; logical_to_physical int64 [L, E, X], ascending slots, then -1; replica_count
    int64 [L, E]; num_ranks, num_nodes; version, counted up from placement to placement; moves int64 [M, 4], what
    changed against the previous placement: (layer, slot, logical expert that it gets, slot that had it before: in the
    same node where there is one); partial: experts may be without any slot, their ranks
    were lost.

    Raises
    ------
    InvalidArgument
        A slot holds no expert of the model, an expert has no slot, a rank holds an expert twice, or an argument is of another type.

    Source: DeepSeek-V3 technical report, sections 3.4.1 and 3.4.2 (redundant experts).
    """

    physical_to_logical: torch.Tensor
    num_experts: int
    num_ranks: int
    num_nodes: int = 1
    version: int = 0
    previous: InitVar[Placement | None] = None
    partial: bool = False
    logical_to_physical: torch.Tensor = field(init=False, repr=False)
    replica_count: torch.Tensor = field(init=False, repr=False)
    moves: torch.Tensor = field(init=False, repr=False)
    # Buffer takes the router from the placement that it is given, so that it need not import this package.
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
        """Layers L."""
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """Slots P over all ranks."""
        return self.physical_to_logical.shape[1]

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank."""
        return self.num_slots // self.num_ranks

    @property
    def digest(self) -> str:
        """A few characters that are equal where version and table are."""
        return f"{self.version}-{zlib.crc32(self.physical_to_logical.numpy().tobytes()):08x}"

    def rank_load(self, load: ArrayLike) -> torch.Tensor:
        """Load of every rank if each expert's load is split evenly over its replicas.

        load : array [L, E]. Returns float64 [L, ranks].

        Raises
        ------
        InvalidArgument
            load has another shape, or is no array of numbers.
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
        """Mean over layers of mean/max rank load, 1.0 at best; a layer without load counts as balanced."""
        load = torch.from_numpy(_finite("balancedness", "load", load))
        largest = load.max(1, keepdim=True).values if load.dim() == 2 and load.numel() else load
        rank = self.rank_load(
            load / torch.where(largest > 0, largest, 1.0)
        )  # of loads up to 1: no sum overflows, no quotient vanishes
        highest = rank.max(1).values
        return float(
            torch.where(highest > 0, rank.mean(1) / torch.where(highest > 0, highest, 1.0), 1.0).mean()
        )

    def surviving(self, alive: Sequence[int], *, num_nodes: int = 1) -> Placement:
        """This placement on the ranks that are left, numbered anew in ascending order; they keep their slots.

        alive : ranks of this placement. num_nodes : of the surviving world. Returns a Placement with `partial` set, whose
        .replica_count is 0 for experts that no survivor holds.

        Raises
        ------
        InvalidArgument
            alive is empty or names a rank that does not exist.
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
            f"a list of ranks in 0..{self.num_ranks - 1}",
        )
        table = self.physical_to_logical.view(self.num_layers, self.num_ranks, -1)[:, alive].reshape(
            self.num_layers, -1
        )
        return Placement(table, self.num_experts, len(alive), num_nodes, self.version, partial=True)

    def migrate(self, weights: Sequence[Any], comm: Communicator) -> Migrating:
        """The same as moecomm.balance.migrate(self, weights, comm). Collective.

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
        # Sources take turns, those in the slot's own node first.
        sources = before.logical_to_physical[layer, expert]
        per_node = self.num_slots // self.num_nodes
        far = (sources // per_node != (slot // per_node)[:, None]).long() + 2 * (sources < 0)
        nearest = far == far.min(1, keepdim=True).values
        turn = (slot % nearest.sum(1).clamp_min(1))[:, None]
        chosen = ((nearest.cumsum(1) - 1 == turn) & nearest).long().argmax(1, keepdim=True)
        return torch.stack([layer, slot, expert, sources.gather(1, chosen).flatten()], 1)


def _finite(op: str, name: str, load: ArrayLike) -> np.ndarray:
    """Loads as float64 on the host."""
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
) -> Placement:
    """A placement that balances the ranks under this load. Deterministic; releases the GIL.

    Parameters
    ----------
    load : array or Tensor [L, E]
        Tokens (or any measure, >= 0) per layer and logical expert.
    num_replicas : int
        Slots P per layer over all ranks, a multiple of num_ranks, num_experts <= P.
    num_groups : int
        Consecutive experts form groups whose replicas stay in one node, as node-limited routing wants; 1: no such limit.
    num_nodes, num_ranks : int
        num_nodes divides num_ranks and, where num_groups > 1, num_groups.
    previous : Placement, optional
        In force now. Ranks are relabelled so that most replicas stay; the result's .moves say what changes.
    max_moves : int, optional
        Most slots that change on any rank in a layer; needs previous. A group stays on its node then.
    connected : bool
        Spread replicated experts so that they join all ranks (of a node, with groups): the split at run time
        (replicas="optimal") can then move load from any rank to any other. From three slots per rank on.

    Returns
    -------
    Placement

    Raises
    ------
    InvalidArgument
        A shape or number does not fit, or load is negative or not finite.

    Source: DeepSeek-V3 technical report, section 3.4.1; rebalancing every few minutes from online statistics.
    """
    op = "rebalance"
    load = _finite(op, "load", load)
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
            home = node_of[:, :, :1].reshape(load.shape[0], num_groups, -1)
            together = (home == home[..., :1]).all() and (
                (node_of == node_of[:, :, :1]) | (previous.logical_to_physical < 0)
            ).all()
            require(
                bool(together), op, "previous", previous, "a placement that keeps every group in one node"
            )
        before = np.ascontiguousarray(previous.physical_to_logical.numpy(), dtype=np.int32)
    if max_moves is not None:
        require(previous is not None, op, "max_moves", max_moves, "None without previous")
        max_moves = integer(op, "max_moves", max_moves, 0)
    out = np.empty((load.shape[0], num_replicas), dtype=np.int32)
    native.rebalance(
        load, out, num_groups, num_nodes, num_ranks, before, -1 if max_moves is None else max_moves, connected
    )
    return Placement(
        torch.from_numpy(out),
        experts,
        num_ranks,
        num_nodes,
        0 if previous is None else previous.version + 1,
        previous,
    )


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The static plan with the signature that serving engines already call.

    Parameters
    ----------
    weight : Tensor [L, E]
        Load statistics of the logical experts.
    num_replicas, num_groups, num_nodes, num_gpus : int
        Slots, groups, nodes, ranks; groups stay in a node where num_nodes divides num_groups, else anything goes.

    Returns
    -------
    (physical_to_logical [L, P], logical_to_physical [L, E, X] with -1, replica_count [L, E]), all int64

    Raises
    ------
    InvalidArgument
        As rebalance.
    """
    num_groups, num_nodes = (
        integer("rebalance", name, value, 1, MOST_EXPERTS)
        for name, value in dict(num_groups=num_groups, num_nodes=num_nodes).items()
    )
    groups = num_groups if num_groups % num_nodes == 0 else 1
    p = rebalance(
        weight, num_replicas=num_replicas, num_groups=groups, num_nodes=num_nodes, num_ranks=num_gpus
    )
    return p.physical_to_logical, p.logical_to_physical, p.replica_count
