"""Expert parallelism of Hugging Face transformers (>= 5.23) over moecomm.

Importing this module registers the implementation "moecomm":

    import moecomm.integrations.transformers
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(
        tp_size=8, ep_size=8, ep_implementation="moecomm"))

A router that balances its experts by a bias needs the bias in float32. If the model is cast after loading, for
example by model.bfloat16(), call this first:

    moecomm.gate.keep_float32(model, "e_score_correction_bias")
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import (  # type: ignore[import-not-found]
    EPImplementation,
    EPImplementationInterface,
)

from ..buffer import Buffer
from ..communicator import Communicator


class _Exchange:
    """Shared by the layers of one expert group: a Communicator, and one Buffer per shape."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._comm: Communicator | None = None
        self._buffers: dict[Any, Any] = {}
        self.layers = 0

    def buffer(self, options: Any, **shape: Any) -> Any:
        """Return the Buffer for this shape. The first call for a shape makes it, on all ranks of the group."""
        if self._comm is None:
            self._comm = Communicator(
                self._group, ranks_per_node=options["ranks_per_node"], timeout=options["timeout"]
            )
        key = tuple(sorted(shape.items(), key=lambda item: item[0]))
        if key not in self._buffers:
            arena = None  # the arena grows with the calls
            if options["max_tokens"] is not None:
                shape["max_tokens"] = options["max_tokens"]
                # Training keeps the rows of every layer alive, plus those of a recomputed one.
                arena = Buffer.arena_hint(self._comm, **shape, dispatches=self.layers + 2)
            self._buffers[key] = Buffer(self._comm, **shape, arena_bytes=arena)
        return self._buffers[key]

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        if self._comm is not None:
            self._comm.close()


_exchanges: dict[Any, Any] = {}


class MoecommEP(EPImplementation):  # type: ignore[misc]
    """Sends tokens to their experts and back with dispatch and combine, one row per token and rank.

    Differentiable in hidden states and routing weights. Ranks may have different numbers of tokens, including none.
    With tensor parallelism, the ranks that share a batch take one slice each and gather the results.
    """

    options = dict(  # noqa: RUF012 - a subclass replaces the whole table
        max_tokens=None, ranks_per_node=None, timeout=None
    )

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        group = ep_mesh.get_group()
        self._exchange = _exchanges.setdefault(group, _Exchange(group))
        self._exchange.layers += 1

    def __call__(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        """Compute the weighted sum of the experts' outputs.

        Parameters
        ----------
        hidden_states : Tensor [T, hidden]
        top_k_index : Tensor [T, top_k]
            Global expert ids.
        top_k_weights : Tensor [T, top_k]

        Returns
        -------
        Tensor [T, hidden]
        """
        tokens = hidden_states.shape[0]
        x, ids, weights = (self._slice(t) for t in (hidden_states, top_k_index, top_k_weights))
        buffer = self._exchange.buffer(
            self.options,
            hidden=x.shape[1],
            num_experts=self.num_local_experts * self.ep_mesh.size(),
            top_k=ids.shape[1],
            dtype=x.dtype,
        )
        out = buffer.dispatch(x.contiguous(), ids.contiguous(), weights.float().contiguous(), layout="rank")
        received, count = out.x, out.x.shape[0]
        # transformers marks a pick to skip with the id num_local_experts.
        local = torch.where(out.topk_ids < 0, self.num_local_experts, out.topk_ids)
        row_weights = out.topk_weights.to(x.dtype)
        if count == 0:
            # Without rows, backward would skip the experts and both collective calls on this rank. Compute one row of
            # zeros and drop it.
            received, local, row_weights = (
                received.sum(0, keepdim=True),
                local.new_zeros(1, 1),
                row_weights.new_zeros(1, 1),
            )
        rows = self.experts_forward(received, local, row_weights)[:count]
        return self._gather(buffer.combine(rows.contiguous(), out.handle), tokens)

    def _slice(self, tensor: Any) -> Any:
        if self.tp_mesh.size() == 1:
            return tensor
        return (
            DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(self.tp_mesh, [Shard(0)])
            .to_local()
        )

    def _gather(self, y: torch.Tensor, tokens: int) -> Any:
        if self.tp_mesh.size() == 1:
            return y
        shape = torch.Size((tokens, y.shape[1]))
        return DTensor.from_local(
            y, self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        ).full_tensor()


def register(
    name: Any = "moecomm",
    *,
    max_tokens: int | None = None,
    ranks_per_node: int | None = None,
    timeout: float | None = None,
) -> None:
    """Register the implementation under a name. The import registers "moecomm"; call again to change its options.

    Parameters
    ----------
    name : str
        For DistributedConfig(ep_implementation=name).
    max_tokens : int, optional
        Maximum number of tokens of a rank in one call of a layer; with tensor parallelism, of its slice. Default:
        memory grows with the calls.
    ranks_per_node, timeout
        As for Communicator.
    """
    options = dict(max_tokens=max_tokens, ranks_per_node=ranks_per_node, timeout=timeout)
    EPImplementationInterface.register(
        name, type("MoecommEP", (MoecommEP,), {"options": options, "__doc__": MoecommEP.__doc__})
    )


def close() -> None:
    """Release all buffers and communicators that models have made. The models cannot run afterwards.

    Local. Call it before the process group is destroyed.
    """
    for exchange in _exchanges.values():
        exchange.close()
    _exchanges.clear()


register()
