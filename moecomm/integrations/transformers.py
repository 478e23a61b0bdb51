"""Expert parallelism of Hugging Face transformers (>= 5.23) over moecomm.

Importing this registers the implementation "moecomm":

    import moecomm.integrations.transformers
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=DistributedConfig(
        tp_size=8, ep_size=8, ep_implementation="moecomm"))

Routers that balance by a bias need it in float32, also where the model is cast after loading (model.bfloat16()):

    moecomm.gate.keep_float32(model, "e_score_correction_bias")
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from ..buffer import Buffer
from ..communicator import Communicator


class _Exchange:
    """What the layers of one expert group share: a Communicator, and a Buffer per shape."""

    def __init__(self, group):
        self._group, self._comm, self._buffers = group, None, {}
        self.layers = 0

    def buffer(self, options, **shape):
        """The Buffer for these rows; made when first asked for, on all ranks of the group."""
        if self._comm is None:
            self._comm = Communicator(
                self._group, ranks_per_node=options["ranks_per_node"], timeout=options["timeout"]
            )
        key = tuple(sorted(shape.items(), key=lambda item: item[0]))
        if key not in self._buffers:
            shape["max_tokens"] = options["max_tokens"]
            # Training holds the rows of every layer, and those of a recomputed one.
            arena = Buffer.arena_hint(self._comm, **shape, dispatches=self.layers + 2)
            self._buffers[key] = Buffer(self._comm, **shape, arena_bytes=arena)
        return self._buffers[key]

    def close(self):
        for buffer in self._buffers.values():
            buffer.close()
        if self._comm is not None:
            self._comm.close()


_exchanges = {}


class MoecommEP(EPImplementation):
    """Tokens to the ranks of their experts and back by dispatch and combine, one row per token and rank.

    Differentiable in hidden states and routing weights. Ranks may hold different numbers of tokens, also
    none; ranks that share a batch (tensor parallelism) take a slice of it each and gather the results.
    """

    options = dict(  # noqa: RUF012 - a subclass replaces the whole table
        max_tokens=4096, ranks_per_node=None, timeout=30.0
    )

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        group = ep_mesh.get_group()
        self._exchange = _exchanges.setdefault(group, _Exchange(group))
        self._exchange.layers += 1

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        """[T, hidden], global ids [T, top_k], weights [T, top_k] -> the experts' weighted sum [T, hidden]."""
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
        local = torch.where(
            out.topk_ids < 0, self.num_local_experts, out.topk_ids
        )  # how transformers says "skip"
        row_weights = out.topk_weights.to(x.dtype)
        if count == 0:
            # One row of zeros, of which nothing is kept: backward then finds the experts and both exchanges here too.
            received, local, row_weights = (
                received.sum(0, keepdim=True),
                local.new_zeros(1, 1),
                row_weights.new_zeros(1, 1),
            )
        rows = self.experts_forward(received, local, row_weights)[:count]
        return self._gather(buffer.combine(rows.contiguous(), out.handle), tokens)

    def _slice(self, tensor):
        if self.tp_mesh.size() == 1:
            return tensor
        return (
            DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(self.tp_mesh, [Shard(0)])
            .to_local()
        )

    def _gather(self, y, tokens):
        if self.tp_mesh.size() == 1:
            return y
        shape = (tokens, y.shape[1])
        return DTensor.from_local(
            y, self.tp_mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        ).full_tensor()


def register(name="moecomm", *, max_tokens=4096, ranks_per_node=None, timeout=30.0):
    """Make the implementation known under a name; called once on import, again to change what it uses.

    Parameters
    ----------
    name : str
        For DistributedConfig(ep_implementation=name).
    max_tokens : int
        Most tokens that a rank brings to one layer call (its slice, where ranks share a batch).
    ranks_per_node, timeout
        As for Communicator.
    """
    options = dict(max_tokens=max_tokens, ranks_per_node=ranks_per_node, timeout=timeout)
    EPImplementationInterface.register(
        name, type("MoecommEP", (MoecommEP,), {"options": options, "__doc__": MoecommEP.__doc__})
    )


def close():
    """Release all buffers and communicators that models have made; they cannot run afterwards.

    Local, before the group ends.
    """
    for exchange in _exchanges.values():
        exchange.close()
    _exchanges.clear()


register()
