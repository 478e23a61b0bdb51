"""What is asked of the planner, and the routing that stands for the tokens."""

from __future__ import annotations

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

DECODE_TOKENS = 256  # up to here a step is taken for decoding where nothing is said


@dataclass(frozen=True)
class Question:
    """One step of one MoE layer on a cluster.

    model_name, model : str, presets.ModelShape
    cluster : clusters.Cluster
    ranks, ranks_per_node, slots : int
        slots: physical experts over all ranks; those beyond the routed ones are copies of the busiest, or the shared expert.
    top_k : int
        Picks of a token; one more than the model's where the shared expert is routed too.
    top_groups : int
        The gate's node limit M: groups that a token's experts come from.
    tokens : int
        Per rank, of one micro-batch.
    routing : str
        uniform | zipf | the folder of a recording.
    decode : bool
        The decode path (one put per token and rank) or the throughput path (two hops).
    quant : None or "fp8"
    num_sms : int
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
    def nodes(self):
        """Nodes that the ranks fill."""
        return self.ranks // self.ranks_per_node

    @property
    def groups(self):
        """Groups of the gate: the model's; where it has none, one per node."""
        return (
            self.model.num_groups
            if self.model.num_groups > 1
            else self.nodes
            if self.model.num_experts % self.nodes == 0
            else 1
        )

    @property
    def shared_is_routed(self):
        """Whether every token also picks the shared expert."""
        return self.top_k > self.model.top_k

    def varied(self, **changes):
        """The same question with something else in place."""
        return replace(self, **changes)


MOST_RANKS, MOST_TOKENS = 4096, 1 << 22  # of a question: ranks, and tokens of all of them


def ask(
    model,
    cluster,
    ranks,
    tokens,
    *,
    routing="uniform",
    decode=None,
    quant="fp8",
    num_sms=20,
    top_groups=None,
    slots_per_rank=None,
):
    """A Question from names, with the published deployment of that many ranks where there is one.

    Parameters
    ----------
    model, cluster : str
        A name of moecomm.presets (dashes allowed), of moecomm.clusters.
    ranks, tokens, num_sms : int
    decode : bool, optional
        None: yes up to 256 tokens per rank.
    top_groups, slots_per_rank : int, optional
        None: the model's node limit; the deployment's slots, or as few as hold every expert.

    Raises
    ------
    InvalidArgument
        There is no such model or cluster, or the experts do not fit.
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
            f"slots_per_rank: got {slots_per_rank}; expected at least {-(-shape.num_experts // ranks)} for {shape.num_experts} experts "
            f"on {ranks} ranks",
            op="plan",
        )
    # A shared expert rides along as one more pick where there are slots to spare for it.
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


def _node_size(ranks, per_node):
    return next(p for p in range(min(ranks, per_node), 0, -1) if ranks % p == 0)


def route(question, seed=0):
    """Physical ids, int64 [ranks, tokens, top_k]: the model's gate over the routing, then a copy of every expert by turns.

    Raises
    ------
    InvalidArgument
        The recording is of another model.
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
        copies, count = placement.logical_to_physical[0].numpy(), placement.replica_count[0].numpy()
        turn = np.arange(len(logical))[:, None] + np.arange(logical.shape[1])
        physical = np.where(logical >= 0, copies[logical, turn % count[logical]], -1)
    return torch.from_numpy(physical.reshape(q.ranks, q.tokens, q.top_k).astype(np.int64))


def _placement_groups(q):
    fits = q.groups % q.nodes == 0 and q.model.num_experts % q.groups == 0
    return q.groups if fits and not q.shared_is_routed else 1


def _gated(q, seed):
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
            f"routing: got {q.routing!r}; expected uniform, zipf or the folder of a recording", op="plan"
        )
    return gate.group_limited_top_k(
        logits.sigmoid(), q.model.top_k, num_groups=q.groups, top_groups=q.top_groups
    ).numpy()


def _recorded(q):
    ranks = record.load(q.routing)
    header = ranks[0].header
    if (header["num_experts"], header["top_k"]) != (q.model.num_experts, q.model.top_k):
        raise InvalidArgument(
            f"routing: {q.routing!r} has top-{header['top_k']} of {header['num_experts']} experts; "
            f"expected top-{q.model.top_k} of {q.model.num_experts}",
            op="plan",
        )
    ids = np.concatenate([i for r in ranks for i in r.ids]).astype(np.int64)
    require(len(ids), "plan", "routing", q.routing, "a recording with tokens")
    return np.resize(ids, (q.ranks * q.tokens, q.model.top_k))
