"""Replica routing: maps the logical picks of a batch to expert slots, inside dispatch."""

from __future__ import annotations

from typing import Any

import zlib

import numpy as np
import torch

from .._cuda import cuda
from .._native import balance as native
from .._native import core
from ..checks import require
from ..refusals import chosen, made
from ..shapes import MODES
from ..tensors import picks_of


class ReplicaRouter:
    """Chooses the replicas for one Buffer. Call check first. Construction is not collective.

    Parameters
    ----------
    comm : Communicator
    placement : Placement
        For comm.size ranks.
    mode : "local", "even" or "optimal"
        local: sends each token to as few nodes as possible, then to the least loaded rank, based on this source's
        picks alone. even: splits this source's tokens for an expert evenly over its replicas. optimal: minimizes the
        load of the heaviest rank for this batch, based on the picks of all sources. dispatch exchanges them together
        with its counts, and every rank computes the same split. All modes prefer few nodes per token among equal
        choices.
    activate : int, optional
        Number of slots per rank that may run in one batch. They are chosen from the picks of all ranks.
    renormalize : bool
        Scale the remaining weights of a token that lost picks, so that their sum does not change.
    monitor : LoadMonitor, optional
        Receives the counts of every batch.

    Raises
    ------
    InvalidArgument
        `activate` slots per rank are too few to run all experts.
    """

    def __init__(
        self,
        comm: Any,
        placement: Any,
        mode: str,
        activate: int | None = None,
        renormalize: bool = False,
        monitor: Any = None,
    ) -> None:
        self.comm, self.mode, self.activate, self.renormalize, self.monitor = (
            comm,
            mode,
            activate,
            renormalize,
            monitor,
        )
        # By parity of the decode epoch: the slot ids of its picks, and which experts had no slot.
        self.decoding: list[tuple[Any, torch.Tensor | None]] = [(None, None), (None, None)]
        self._adopt(placement)

    @staticmethod
    def check(comm: Any, placement: Any, num_experts: Any, activate: Any, monitor: Any) -> None:
        """Refuse arguments of a Buffer that contradict each other.

        Raises
        ------
        InvalidArgument
            An argument does not fit the placement or the communicator.
        """
        op = "Buffer"
        require(
            placement.num_experts == num_experts,
            op,
            "num_experts",
            num_experts,
            f"{placement.num_experts}, the logical experts of the placement",
        )
        require(
            placement.num_ranks == comm.size, op, "placement", placement, f"a Placement for {comm.size} ranks"
        )
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
    def logical_experts(self) -> int:
        """Number of logical experts whose counts all ranks exchange; 0 if each rank chooses from its own picks."""
        return self.placement.num_experts if self._choices[0].needs_all else 0

    def use(self, placement: Any) -> None:
        """Switch to another placement, as Buffer.use.

        Raises
        ------
        InvalidArgument, ConfigMismatch
            As Buffer.use.
        """
        old = self.placement

        def check() -> dict[str, Any]:
            table = getattr(placement, "physical_to_logical", None)
            fits = isinstance(table, torch.Tensor) and table.shape == old.physical_to_logical.shape
            require(
                fits and placement.num_experts == old.num_experts,
                "use",
                "placement",
                placement,
                f"a Placement of the same layers, slots and experts as {old}",
            )
            return {"placement": placement.digest}

        self.comm.order.settle()  # when all ranks are here, all ranks have completed every earlier batch
        self.comm.collective.require_equal("use", self.comm.collective.everywhere("use", check))
        self._adopt(placement)

    def _adopt(self, placement: Any) -> None:
        tables = [np.ascontiguousarray(row) for row in placement.physical_to_logical.to(torch.int32).numpy()]
        shape = placement.num_experts, placement.num_ranks, self.comm.num_nodes
        if self.activate is not None:
            for layer, table in enumerate(tables):
                stuck: Any = native.Replicas(table, *shape).activate(
                    np.ones(placement.num_experts), self.activate, np.empty(len(table), dtype=np.uint8)
                )
                require(
                    stuck < 0,
                    "Buffer",
                    "activate",
                    self.activate,
                    f"enough slots to also run expert {stuck} of layer {layer}",
                )
        self.placement, self._choices = (
            placement,
            [
                core.ReplicaPolicy(table, *shape, MODES.index(self.mode), self.activate or 0)
                for table in tables
            ],
        )
        self._routing = [
            zlib.crc32(f"{placement.digest}/{layer}".encode()) for layer in range(placement.num_layers)
        ]
        self._lost = (placement.replica_count == 0).to(self.comm.device) if placement.partial else None

    def require_layer(self, op: str, layer: Any) -> None:
        """Refuse a layer that the placement does not have.

        Raises
        ------
        InvalidArgument
            layer is not an index of a layer.
        """
        require(
            isinstance(layer, int) and 0 <= layer < len(self._choices),
            op,
            "layer",
            layer,
            f"0..{len(self._choices) - 1}",
        )

    def request(self, topk_ids: torch.Tensor, layer: int) -> ReplicaRequest:
        """Make the ReplicaRequest for the logical ids [T, K] of a batch. A native call fills in their slots."""
        return ReplicaRequest(
            topk_ids, self._choices[layer], self._routing[layer], self.placement.num_experts
        )

    def record(self, request: ReplicaRequest, layer: int) -> None:
        """Pass the counts of a batch to the monitor."""
        if self.monitor is not None:
            self.monitor.record(layer, request.counted, everywhere=self.logical_experts > 0)

    def choose_for_decode(self, backend: Any, topk_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the slot ids of a decode batch. If the choice needs the counts of all ranks, exchange them first.

        Raises
        ------
        InvalidArgument
            As dispatch.
        """
        op = "decode_dispatch"
        self.require_layer(op, layer)
        self.comm.order.settle()
        return self.choose(backend, op, topk_ids, layer)

    def choose(self, backend: Any, op: str, topk_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Return the slot ids of a batch, with a separate exchange of counts if the choice needs one.

        The host makes the choice: ids on a GPU are copied to it first, after the earlier work of their stream.

        Raises
        ------
        InvalidArgument
            As dispatch. Also during the capture of a CUDA graph.
        """
        if self.comm.gpu is not None:
            cuda.refuse_capture(op, self.comm, "placement", "the host chooses the replicas of every batch")
        request = self.request(topk_ids, layer)
        if self.logical_experts:  # else the choice is local
            made(backend)
        failure = backend.choosing.choose(request.ids.data_ptr(), len(request.ids), request.native)
        if failure is not None:
            backend.fail(op, failure)
        chosen(backend)
        self.record(request, layer)
        return request.slots.to(topk_ids.device)

    def gone(self, layer: int) -> torch.Tensor | None:
        """Which experts of a layer have no slot, bool [num_experts]; None: every expert has one."""
        return None if self._lost is None else self._lost[layer]

    def account(
        self, topk_ids: torch.Tensor, weights: torch.Tensor | None, gone: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(weights, lost): the weights, renormalized if requested, and the lost weight per token, float32 [T].

        gone: the experts without a slot, or None.
        """
        if gone is None:
            return weights, torch.zeros(len(topk_ids), device=topk_ids.device, dtype=torch.float32)
        given = (
            torch.ones(topk_ids.shape, device=topk_ids.device, dtype=torch.float32)
            if weights is None
            else weights
        )
        missing = picks_of(gone, topk_ids)
        lost = (given * missing).sum(1)
        if self.renormalize:
            kept = (given * (~missing & (topk_ids >= 0))).sum(1)
            weights = given * torch.where(kept > 0, (kept + lost) / kept.where(kept > 0, 1.0), 1.0)[:, None]
        return weights, lost.detach()


class ReplicaRequest:
    """Logical ids in, slot ids out. A native call that gets .native fills .slots int64 [T, K] and .counted int32 [E].

    .counted are the picks per logical expert, of all ranks if the choice needs them, else of this rank.
    """

    def __init__(self, topk_ids: torch.Tensor, choice: Any, routing: int, experts: int) -> None:
        self.ids = topk_ids.detach().to("cpu", torch.int64).contiguous()
        self.slots = torch.empty_like(self.ids)
        self.counted = np.empty(experts, dtype=np.int32)
        self.native = core.ReplicaRequest(choice, routing, self.slots.numpy(), self.counted)
