"""Replica choice: from a batch's logical picks to the slots that serve them, inside dispatch."""

from __future__ import annotations

import numpy as np
import torch

from .._native import balance as native
from ..errors import InvalidArgument
from .placement import Placement, require

MODES = ("local", "even", "optimal")


class Replicas:
    """The replica choice of one Buffer. Construction is collective where the choice needs the counts of all ranks; check comes first.

    Parameters
    ----------
    comm : Communicator
    placement : Placement
        Of comm.size ranks.
    mode : "local", "even" or "optimal"
        local: per token as few nodes as possible, then the least loaded rank, from this source's own picks.
        even: this source's tokens of an expert evenly over its replicas. optimal: the split that makes the heaviest
        rank lightest for this batch, from the counts of all sources: they are exchanged once per batch, one row per
        rank; the split itself every rank computes alike. All three keep a token in few nodes where they can choose.
    activate : int, optional
        Slots of a rank that may run in one batch; the choice of them is from the counts of all ranks too.
    renormalize : bool
        Scale the weights of a token that lost picks so that they sum to what they did.
    monitor : LoadMonitor, optional
        Gets the counts of every batch.

    Raises
    ------
    InvalidArgument
        `activate` slots per rank cannot run all experts.
    """

    def __init__(self, comm, placement, mode, activate=None, renormalize=False, monitor=None):
        self.comm, self.mode, self.activate, self.renormalize, self.monitor = comm, mode, activate, renormalize, monitor
        self._counts = CountExchange(comm, placement.num_experts) if mode == "optimal" or activate is not None else None
        self._turn = 0
        self.decoding = [None, None]   # physical ids of the two decode epochs
        self._take(placement)

    @staticmethod
    def check(comm, placement, num_experts, mode, activate, monitor):
        """Refuse arguments of a Buffer that do not go together.

        Raises
        ------
        InvalidArgument
        """
        op = "Buffer"
        require(isinstance(placement, Placement), op, "placement", placement, "a moecomm.balance.Placement")
        require(placement.num_experts == num_experts, op, "num_experts", num_experts, f"the placement's {placement.num_experts} logical experts")
        require(placement.num_ranks == comm.size, op, "placement", placement, f"one of {comm.size} ranks")
        require(mode in MODES, op, "replicas", mode, "one of " + ", ".join(map(repr, MODES)))
        per_rank = placement.slots_per_rank
        require(activate is None or (isinstance(activate, int) and 1 <= activate <= per_rank), op, "activate", activate, f"None or 1..{per_rank}")
        shape = (placement.num_layers, placement.num_experts)
        require(monitor is None or monitor.shape == shape, op, "monitor", monitor, f"a LoadMonitor of {shape[0]} layers and {shape[1]} experts")

    def use(self, placement):
        """As Buffer.use.

        Raises
        ------
        InvalidArgument, ConfigMismatch
        """
        old = self.placement
        fits = isinstance(placement, Placement) and placement.physical_to_logical.shape == old.physical_to_logical.shape
        require(fits and placement.num_experts == old.num_experts, "use", "placement", placement, f"a Placement like {old}")
        # Everyone is here, so every batch before this is over everywhere.
        self.comm._require_equal("use", self.comm._exchange({"placement": placement.digest}))
        self._take(placement)

    def _take(self, placement):
        tables = placement.physical_to_logical.to(torch.int32).numpy()
        layers = [native.Replicas(np.ascontiguousarray(row), placement.num_experts, placement.num_ranks, self.comm.num_nodes) for row in tables]
        if self.activate is not None:
            for layer, r in enumerate(layers):
                stuck = r.activate(np.ones(placement.num_experts), self.activate, np.empty(r.count, dtype=np.uint8))
                require(stuck < 0, "Buffer", "activate", self.activate, f"room to run expert {stuck} of layer {layer} beside the others on its ranks")
        self.placement, self._layers = placement, layers
        self._lost = placement.replica_count == 0 if placement.partial else None

    def choose(self, topk_ids, topk_weights, layer):
        """(physical ids int64 [T, K], weights, weight of lost picks [T] float32) for logical ids. Collective as the class says.

        Raises
        ------
        InvalidArgument
            An id is out of range or twice in a token, or there is no such layer.
        """
        require(isinstance(layer, int) and 0 <= layer < len(self._layers), "dispatch", "layer", layer, f"0..{len(self._layers) - 1}")
        replicas, comm = self._layers[layer], self.comm
        ids = topk_ids.detach().to(torch.int64).contiguous().numpy()
        counts = np.empty(replicas.experts, dtype=np.int32)
        code, token, bad = native.count_picks(ids, counts)
        if code:
            what = f"expert id {bad} is out of range" if code == 1 else f"expert id {bad} is picked twice"
            raise InvalidArgument(f"topk_ids: {what} in token {token}; expected distinct ids in [0, {replicas.experts}), or -1", op="dispatch",
                                  rank=comm.rank, got=bad)
        everyone = self._counts.gather(counts) if self._counts else None
        if self.monitor is not None:
            self.monitor.record(layer, counts if everyone is None else everyone.sum(0), everywhere=everyone is not None)
        physical = np.empty_like(ids)
        self._turn += 1
        turn = self._turn + comm.rank   # sources begin at different replicas
        active = None
        if self.activate is not None:
            active = np.empty(replicas.count, dtype=np.uint8)
            replicas.activate(everyone.sum(0).astype(np.float64), self.activate, active)
        if self.mode == "local":
            replicas.route_locally(ids, comm.node, turn, physical, active)
        else:
            quota = np.empty(replicas.count, dtype=np.int32)
            if self.mode == "even":
                replicas.even(counts, turn, quota, active)
            else:
                share = np.empty(replicas.count)
                replicas.split(everyone.sum(0).astype(np.float64), share, active)
                replicas.quotas(everyone, comm.rank, share, self._turn, quota)
            replicas.route_by_quota(ids, comm.node, quota, physical)
        weights, lost = self._account(topk_ids, topk_weights, layer)
        return torch.from_numpy(physical), weights, lost

    def choose_for_decode(self, topk_ids, topk_weights, layer):
        """(physical ids, weights); decode has no place to report lost weight, so nothing may be lost.

        Raises
        ------
        InvalidArgument
            As choose, or the placement is partial.
        """
        require(self._lost is None, "decode_dispatch", "placement", self.placement, "a complete one: lost weight is reported by dispatch only")
        return self.choose(topk_ids, topk_weights, layer)[:2]

    def close(self):
        """Release what the exchange of counts holds."""
        if self._counts is not None:
            self._counts.close()

    def _account(self, topk_ids, weights, layer):
        """What lost picks weighed per token; the weights of the others, scaled up if asked."""
        if self._lost is None:
            return weights, torch.zeros(len(topk_ids))
        given = torch.ones(topk_ids.shape) if weights is None else weights
        gone = self._lost[layer][topk_ids.clamp_min(0).long()] & (topk_ids >= 0)
        lost = (given * gone).sum(1).detach()
        if self.renormalize:
            kept = (given * (~gone & (topk_ids >= 0))).sum(1)
            weights = given * torch.where(kept > 0, (kept + lost) / kept.where(kept > 0, torch.ones(())), 1.0)[:, None]
        return weights, lost


class CountExchange:
    """Every rank learns every rank's counts: one row from each rank to each, through the library's own dispatch."""

    _PICKS = 32   # destinations of one row at most

    def __init__(self, comm, experts):
        from ..buffer import Buffer

        self._comm, self._experts = comm, experts
        rows, width = -(-comm.size // self._PICKS), -(-experts // 4) * 4
        top_k = min(comm.size, self._PICKS)
        self._buffer = Buffer(comm, hidden=width, num_experts=comm.size, top_k=top_k, max_tokens=rows, dtype=torch.float32)
        self._row = torch.zeros((rows, width), dtype=torch.int32)
        ids = torch.arange(rows * top_k)
        self._ids = ids.where(ids < comm.size, -1).view(rows, top_k)

    def gather(self, counts):
        """counts int32 [E] of this rank -> int32 [size, E]. Collective; in order with what was submitted before."""
        self._row[:, :self._experts] = torch.from_numpy(counts)

        def exchange():
            rows = self._buffer.dispatch(self._row.view(torch.float32), self._ids, layout="rank").x
            return rows.view(torch.int32)[:, :self._experts].contiguous().numpy()

        return exchange() if self._comm._executor is None else self._comm._submit(exchange).result()

    def close(self):
        """Release the window."""
        self._buffer.close()
