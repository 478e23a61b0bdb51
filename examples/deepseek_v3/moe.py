"""Mixture-of-Experts layers: over ranks with moecomm.nn.MoE, or in one process without a communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import moecomm
from moecomm.gate import Gate
from moecomm.nn import Experts, MoE, SwiGLU

from .config import Config


def make_gate(config: Config) -> Gate:
    """Make the sigmoid gate, limited to top_groups groups per token. If each group is on one node, it limits nodes."""
    return Gate(
        config.hidden,
        config.num_experts,
        config.top_k,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        scale=config.scale,
    )


def make_buffer(
    comm: moecomm.Communicator,
    config: Config,
    max_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    dispatches: int = 0,
) -> moecomm.Buffer:
    """Make the Buffer that all layers share.

    Parameters
    ----------
    max_tokens : int
        Tokens of a rank in one call.
    dispatches : int
        Dispatches that are alive at once. 0: one per layer with experts, and two for backward. Inference needs 2.
    """
    shape: dict[str, Any] = dict(
        hidden=config.hidden,
        num_experts=config.num_experts,
        top_k=config.top_k,
        max_tokens=max_tokens,
        dtype=dtype,
    )
    held = dispatches or config.moe_layers + 2
    return moecomm.Buffer(
        comm, **shape, arena_bytes=moecomm.Buffer.arena_hint(comm, **shape, dispatches=held)
    )


def over_ranks(config: Config, buffer: moecomm.Buffer) -> MoE:
    """Make a layer whose experts are distributed over the ranks of the buffer."""
    return MoE(
        config.hidden,
        config.expert_intermediate,
        config.num_experts,
        config.top_k,
        config.shared_experts,
        buffer,
        gate=make_gate(config),
    )


class OneProcess(nn.Module):
    """A layer with all experts in this process, with the same parameters and results as moecomm.nn.MoE."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = make_gate(config)
        self.experts = Experts(config.hidden, config.expert_intermediate, config.num_experts)
        self.shared_experts = (
            SwiGLU(config.hidden, config.shared_experts * config.expert_intermediate)
            if config.shared_experts
            else None
        )

    def forward(self, x: torch.Tensor, with_routing: bool = False) -> Any:
        """[..., hidden] -> [..., hidden]. with_routing: also return the gate's result."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        ids, weights = routing.topk_ids.flatten(), routing.topk_weights.flatten()
        order = ids.argsort(stable=True)
        source = order // routing.topk_ids.shape[1]
        counts = moecomm.gate.count_picks(ids, self.experts.count)
        rows = self.experts(tokens[source], counts)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.zeros(tokens.shape, dtype=wide)
        y = y.index_add(0, source, rows.to(wide) * weights[order, None]).to(x.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        y = y.view(x.shape)
        return (y, routing) if with_routing else y
