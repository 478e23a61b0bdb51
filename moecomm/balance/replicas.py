"""Replica choice: from a batch's logical picks to the slots that serve them, inside dispatch."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from .._cuda import cuda
from .._native import balance as native
from .._native import core
from ..checks import require
from ..refusals import chosen, made

MODES = ("local", "even", "optimal")


class ReplicaRouter:
    """The replica choice of one Buffer. Construction is each rank's own; check comes first.

    Parameters
    ----------
    comm : Communicator
    placement : Placement
        Of comm.size ranks.
    mode : "local", "even" or "optimal"
        local: per token as few nodes as possible, then the least loaded rank, from this source's own picks.
        even: this source's tokens of an expert evenly over its replicas. optimal: the split that makes the heaviest
        rank lightest for this batch, from the picks of all sources, which travel in the dispatch's own exchange of counts;
        the split itself every rank computes alike. All three keep a token in few nodes where they can choose.
    activate : int, optional
        Slots of a rank that may run in one batch; the choice of them is from the picks of all ranks too.
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
        self.comm, self.mode, self.activate, self.renormalize, self.monitor = (
            comm,
            mode,
            activate,
            renormalize,
            monitor,
        )
        self.decoding = [None, None]  # physical ids of the two decode epochs
        self._take(placement)

    @staticmethod
    def check(comm, placement, num_experts, mode, activate, monitor):
        """Refuse arguments of a Buffer that do not go together.

        Raises
        ------
        InvalidArgument
        """
        op = "Buffer"
        require(
            placement.num_experts == num_experts,
            op,
            "num_experts",
            num_experts,
            f"the placement's {placement.num_experts} logical experts",
        )
        require(placement.num_ranks == comm.size, op, "placement", placement, f"one of {comm.size} ranks")
        require(mode in MODES, op, "replicas", mode, "one of " + ", ".join(map(repr, MODES)))
        per_rank = placement.slots_per_rank
        require(
            activate is None or (isinstance(activate, int) and 1 <= activate <= per_rank),
            op,
            "activate",
            activate,
            f"None or 1..{per_rank}",
        )
        shape = (placement.num_layers, placement.num_experts)
        require(
            monitor is None or (hasattr(monitor, "record") and getattr(monitor, "shape", None) == shape),
            op,
            "monitor",
            monitor,
            f"a LoadMonitor of {shape[0]} layers and {shape[1]} experts",
        )

    @property
    def logical_experts(self):
        """Experts whose picks all ranks tell each other; 0 where each chooses by its own."""
        return self.placement.num_experts if self._choices[0].needs_all else 0

    def use(self, placement):
        """As Buffer.use.

        Raises
        ------
        InvalidArgument, ConfigMismatch
        """
        old = self.placement

        def check():
            table = getattr(placement, "physical_to_logical", None)
            fits = isinstance(table, torch.Tensor) and table.shape == old.physical_to_logical.shape
            require(
                fits and placement.num_experts == old.num_experts,
                "use",
                "placement",
                placement,
                f"a Placement like {old}",
            )
            return {"placement": placement.digest}

        self.comm._settle()  # everyone comes here, so every batch before this is over everywhere
        self.comm._require_equal("use", self.comm._everywhere("use", check))
        self._take(placement)

    def _take(self, placement):
        tables = [np.ascontiguousarray(row) for row in placement.physical_to_logical.to(torch.int32).numpy()]
        shape = placement.num_experts, placement.num_ranks, self.comm.num_nodes
        if self.activate is not None:
            for layer, table in enumerate(tables):
                stuck = native.Replicas(table, *shape).activate(
                    np.ones(placement.num_experts), self.activate, np.empty(len(table), dtype=np.uint8)
                )
                require(
                    stuck < 0,
                    "Buffer",
                    "activate",
                    self.activate,
                    f"room to run expert {stuck} of layer {layer} beside the others on its ranks",
                )
        self.placement, self._choices = (
            placement,
            [core.Choice(table, *shape, MODES.index(self.mode), self.activate or 0) for table in tables],
        )
        self._routing = [
            zlib.crc32(f"{placement.digest}/{layer}".encode()) for layer in range(placement.num_layers)
        ]
        self._lost = (placement.replica_count == 0).to(self.comm.device) if placement.partial else None

    def require_layer(self, op, layer):
        """Refuse a layer that the placement does not have.

        Raises
        ------
        InvalidArgument
        """
        require(
            isinstance(layer, int) and 0 <= layer < len(self._choices),
            op,
            "layer",
            layer,
            f"0..{len(self._choices) - 1}",
        )

    def request(self, topk_ids, layer):
        """The ReplicaRequest of one batch: logical ids [T, K] of a layer, for a native call that chooses their slots."""
        return ReplicaRequest(
            topk_ids, self._choices[layer], self._routing[layer], self.placement.num_experts
        )

    def record(self, request, layer):
        """Tell the monitor what a batch counted."""
        if self.monitor is not None:
            self.monitor.record(layer, request.counted, everywhere=self.logical_experts > 0)

    def choose_for_decode(self, buffer, topk_ids, layer):
        """Physical ids of a decode batch. Decode exchanges no counts; where the choice needs them they take an exchange of their own.

        Raises
        ------
        InvalidArgument
            As dispatch, or the placement is partial: decode has no place to report lost weight.
        """
        op = "decode_dispatch"
        require(
            self._lost is None,
            op,
            "placement",
            self.placement,
            "a complete one: lost weight is reported by dispatch only",
        )
        self.require_layer(op, layer)
        self.comm._settle()
        return self.choose(buffer, op, topk_ids, layer)

    def choose(self, buffer, op, topk_ids, layer):
        """Physical ids of a batch, by an exchange of its own.

        The host chooses: ids on a GPU come here first, behind what their stream has in flight.

        Raises
        ------
        InvalidArgument
            As dispatch, or a CUDA graph is captured.
        """
        if self.comm._gpu is not None:
            cuda.refuse_capture(op, self.comm, "placement", "the host chooses the replicas of every batch")
        request = self.request(topk_ids, layer)
        if self.logical_experts:  # else each rank chooses by itself
            made(buffer)
        failure = buffer._choosing_native.choose(request.ids.data_ptr(), len(request.ids), request.native)
        if failure is not None:
            buffer._fail(op, failure)
        chosen(buffer)
        self.record(request, layer)
        return request.slots.to(topk_ids.device)

    def account(self, topk_ids, weights, layer):
        """(weights, lost): what lost picks weighed per token, float32 [T]; the weights of the others, scaled up if asked."""
        if self._lost is None:
            return weights, torch.zeros(len(topk_ids), device=topk_ids.device, dtype=torch.float32)
        given = (
            torch.ones(topk_ids.shape, device=topk_ids.device, dtype=torch.float32)
            if weights is None
            else weights
        )
        gone = self._lost[layer][topk_ids.clamp(0, self.placement.num_experts - 1).long()] & (topk_ids >= 0)
        lost = (given * gone).sum(1)
        if self.renormalize:
            kept = (given * (~gone & (topk_ids >= 0))).sum(1)
            weights = given * torch.where(kept > 0, (kept + lost) / kept.where(kept > 0, 1.0), 1.0)[:, None]
        return weights, lost.detach()


class ReplicaRequest:
    """Logical ids in, slots out: a native call that is given .native fills .slots, int64 [T, K], and .counted, int32 [E].

    .counted are the picks per logical expert: of all ranks where the choice needs them, else of this one.
    """

    def __init__(self, topk_ids, choice, routing, experts):
        self.ids = topk_ids.detach().to("cpu", torch.int64).contiguous()
        self.slots = torch.empty_like(self.ids)
        self.counted = np.empty(experts, dtype=np.int32)
        self.native = core.Chosen(choice, routing, self.slots.numpy(), self.counted)
