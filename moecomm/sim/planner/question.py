"""Input of the planner, and the routing of its tokens."""

from __future__ import annotations

from typing import Any

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import clusters

from ...nn import gate

from ... import presets

from ...tracing import record
from ...balance import rebalance
from ...checks import MOST_EXPERTS, integer, path, require
from ...errors import InvalidArgument
from ...shapes import QUANTS

DECODE_TOKENS = 256  # up to this number of tokens per rank the default is the decode path


@dataclass(frozen=True)
class Question:
    """One step of one MoE layer on a cluster.

    Attributes
    ----------
    model_name, model : str, presets.ModelShape
    cluster : clusters.Cluster
    ranks, ranks_per_node : int
    slots : int
        Expert slots over all ranks. Slots beyond the routed experts hold further replicas of the most loaded experts,
        or the shared expert.
    top_k : int
        Picks per token: the model's, plus one if the shared expert is routed.
    top_groups : int
        Node limit M of the gate: number of groups from which the experts of a token come.
    tokens : int
        Tokens per rank in one micro-batch.
    routing : str
        "uniform", "zipf", or the folder of a recording.
    decode : bool
        The decode path (one put per token and rank), else the throughput path (two hops).
    quant : None or "fp8"
        Format of the rows of dispatch.
    num_sms : int
        Multiprocessors per rank.
    """

    model_name: str
    model: presets.ModelShape
    cluster: clusters.Cluster
    ranks: int
    ranks_per_node: int
    slots: int
    top_k: int
    top_groups: int
    tokens: int
    routing: str = "uniform"
    decode: bool = False
    quant: str | None = "fp8"
    num_sms: int = 20

    @property
    def nodes(self) -> Any:
        """Number of nodes."""
        return self.ranks // self.ranks_per_node

    @property
    def groups(self) -> Any:
        """Number of expert groups of the gate: the model's, else one per node."""
        return (
            self.model.num_groups
            if self.model.num_groups > 1
            else self.nodes
            if self.model.num_experts % self.nodes == 0
            else 1
        )

    @property
    def shared_is_routed(self) -> bool:
        """Whether every token also picks the shared expert."""
        return self.top_k > self.model.top_k

    def varied(self, **changes: Any) -> Any:
        """Return a copy with some attributes replaced."""
        return replace(self, **changes)


MOST_RANKS, MOST_TOKENS = 4096, 1 << 22  # limits of the ranks, and of the tokens over all ranks


def ask(
    model: Any,
    cluster: Any,
    ranks: Any,
    tokens: Any,
    *,
    routing: Any = "uniform",
    decode: Any = None,
    quant: str | None = "fp8",
    num_sms: int = 20,
    top_groups: int | None = None,
    slots_per_rank: int | None = None,
) -> Any:
    """Make a Question from names. Defaults come from the published deployment with this number of ranks, if any.

    Parameters
    ----------
    model : str
        Name in moecomm.presets; dashes are allowed.
    cluster : str
        Name in moecomm.clusters, or a .toml file.
    ranks, tokens, num_sms : int
        Number of ranks, tokens per rank, multiprocessors per rank.
    routing : str
        "uniform", "zipf", or the folder of a recording.
    decode : bool, optional
        Default: True up to 256 tokens per rank.
    quant : None or "fp8"
    top_groups : int, optional
        Default: the node limit of the model.
    slots_per_rank : int, optional
        Default: as in the published deployment, else the minimum that holds every expert.

    Raises
    ------
    InvalidArgument
        The model or cluster does not exist, a number is out of range, or the experts do not fit into the slots.
    """
    op, shape = "plan", presets.shape_of(model)
    ranks, tokens = integer(op, "ep", ranks, 1, MOST_RANKS), integer(op, "tokens", tokens, 1, 1 << 24)
    require(
        ranks * tokens <= MOST_TOKENS,
        op,
        "tokens",
        tokens,
        f"at most {MOST_TOKENS // ranks} with {ranks} ranks",
    )
    num_sms = integer(op, "num_sms", num_sms, 2, 4096)
    require(num_sms % 2 == 0, op, "num_sms", num_sms, "an even number")
    require(decode is None or isinstance(decode, bool), op, "decode", decode, "True, False or None")
    require(
        quant is None or (isinstance(quant, str) and quant in QUANTS),
        op,
        "quant",
        quant,
        f"one of {', '.join(map(repr, QUANTS))}",
    )
    routing = path(op, "routing", routing)
    top_groups = None if top_groups is None else integer(op, "top_groups", top_groups, 1, MOST_EXPERTS)
    slots_per_rank = (
        None
        if slots_per_rank is None
        else integer(op, "slots_per_rank", slots_per_rank, 1, MOST_EXPERTS // ranks)
    )
    machine = clusters.load(cluster)
    decode = tokens <= DECODE_TOKENS if decode is None else decode
    published = next(
        (
            d
            for d in vars(presets).values()
            if isinstance(d, presets.Deployment) and d.model == shape and d.ranks == ranks
        ),
        None,
    )
    slots = (
        ranks * slots_per_rank
        if slots_per_rank
        else published.experts
        if published
        else ranks * -(-shape.num_experts // ranks)
    )
    if slots < shape.num_experts:
        raise InvalidArgument(
            f"slots_per_rank is {slots_per_rank}; expected at least {-(-shape.num_experts // ranks)} "
            f"for {shape.num_experts} experts on {ranks} ranks",
            op="plan",
        )
    # If there are spare slots, the shared expert is one more pick of every token.
    shared = decode and shape.shared_experts > 0 and slots > shape.num_experts
    question = Question(
        model,
        shape,
        machine,
        ranks,
        _node_size(ranks, machine.ranks_per_node),
        slots,
        shape.top_k + shared,
        1,
        tokens,
        routing,
        decode,
        quant,
        num_sms,
    )
    return question.varied(
        top_groups=min(
            question.groups, top_groups or (shape.top_groups if shape.num_groups > 1 else question.groups)
        )
    )


def _node_size(ranks: Any, per_node: int) -> Any:
    return next(p for p in range(min(ranks, per_node), 0, -1) if ranks % p == 0)


def route(question: Any, seed: int = 0) -> Any:
    """Slot ids int64 [ranks, tokens, top_k]: picks of the model's gate, spread in rotation over the replicas.

    Raises
    ------
    InvalidArgument
        routing is neither a known name nor a folder, or the recording is of another model.
    """
    q = question
    logical = _recorded(q) if Path(q.routing).is_dir() else _gated(q, seed)
    experts = q.model.num_experts
    if q.shared_is_routed:
        logical = np.concatenate([logical, np.full((len(logical), 1), experts)], axis=1)
    load = np.bincount(logical[logical >= 0], minlength=experts + q.shared_is_routed).astype(np.float64)
    if q.slots == len(load):
        physical = logical
    else:
        placement = rebalance(
            load[None] + 1e-6,
            num_replicas=q.slots,
            num_nodes=q.nodes,
            num_ranks=q.ranks,
            num_groups=1 if q.decode else _placement_groups(q),
        )
        replicas, count = placement.logical_to_physical[0].numpy(), placement.replica_count[0].numpy()
        rotation = np.arange(len(logical))[:, None] + np.arange(logical.shape[1])
        physical = np.where(logical >= 0, replicas[logical, rotation % count[logical]], -1)
    return torch.from_numpy(physical.reshape(q.ranks, q.tokens, q.top_k).astype(np.int64))


def _placement_groups(q: Any) -> Any:
    fits = q.groups % q.nodes == 0 and q.model.num_experts % q.groups == 0
    return q.groups if fits and not q.shared_is_routed else 1


def _gated(q: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        (q.ranks * q.tokens, q.model.num_experts), generator=generator, dtype=torch.float32, device="cpu"
    )
    if q.routing == "zipf":  # popularity 1, 1/2, 1/3 ... in a random order
        popularity = (
            (1 + torch.randperm(q.model.num_experts, generator=generator, dtype=torch.int64, device="cpu"))
            .to(torch.float32)
            .reciprocal()
        )
        logits = (
            popularity.log()
            - torch.rand(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
            .clamp_min(1e-12)
            .log()
            .neg()
            .log()
        )
    elif q.routing != "uniform":
        raise InvalidArgument(
            f"routing is {q.routing!r}; expected uniform, zipf or the folder of a recording", op="plan"
        )
    return gate.group_limited_top_k(
        logits.sigmoid(), q.model.top_k, num_groups=q.groups, top_groups=q.top_groups
    ).numpy()


def _recorded(q: Any) -> Any:
    ranks = record.load(q.routing)
    header = ranks[0].header
    if (header["num_experts"], header["top_k"]) != (q.model.num_experts, q.model.top_k):
        raise InvalidArgument(
            f"routing: the recording {q.routing!r} has top-{header['top_k']} of {header['num_experts']} experts; "
            f"expected top-{q.model.top_k} of {q.model.num_experts}",
            op="plan",
        )
    ids = np.concatenate([i for r in ranks for i in r.ids]).astype(np.int64)
    require(len(ids), "plan", "routing", q.routing, "a recording with tokens")
    return np.resize(ids, (q.ranks * q.tokens, q.model.top_k))
