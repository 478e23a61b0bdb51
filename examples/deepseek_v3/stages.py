"""The model as stages for two overlapping micro-batches: one computes while the other communicates.

Source: technical report, sections 3.2 (recomputation) and 3.4.1 (two micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from moecomm.gate import Routing
from moecomm.overlap import Started, two_batches

from .model import Block, Model, Span

Stages = list[tuple[str, Callable[["Flow"], Any]]]


@dataclass
class Flow:
    """State of a micro-batch: ids [B, S], x, and results: logits, drafts (logits of MTP) and routings."""

    ids: torch.Tensor
    x: Any = None
    span: Span | None = None
    logits: Any = None
    drafts: Any = None
    routings: list[Routing] = field(default_factory=list)
    out: Any = None
    tokens: Any = None


def _kept(function: Callable[..., Any], recompute: bool, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def block_stages(block: Block, layer: int, recompute: bool) -> Stages:
    """Stages of a block: attention, dispatch, experts and combine; or attention and dense layer.

    With recompute, the backward pass computes attention and experts again, without further communication.
    """
    moe = block.mlp

    def attend(flow: Flow) -> Flow:
        flow.x = flow.x + _kept(block.attention, recompute, flow.x, flow.span, layer)
        return flow

    def dense(flow: Flow) -> Flow:
        flow.x = flow.x + _kept(lambda x: moe(block.post_attention_layernorm(x)), recompute, flow.x)
        return flow

    def dispatch(flow: Flow) -> Started:
        tokens = block.post_attention_layernorm(flow.x)
        flow.tokens = tokens.flatten(0, 1)
        routing = moe.gate(flow.tokens)
        flow.routings.append(routing)

        def arrived(out: Any) -> Flow:
            flow.out = out
            return flow

        return Started(moe.start_dispatch(flow.tokens, *routing[:2]), arrived)

    def experts(flow: Flow) -> Started:
        out, tokens = flow.out, flow.tokens
        rows = _kept(moe.experts, recompute, out.x, out.rows_per_expert)
        pending = moe.buffer.combine(rows, out.handle, topk_weights=out.topk_weights, async_op=True)
        shared = 0.0 if moe.shared_experts is None else _kept(moe.shared_experts, recompute, tokens)
        flow.out = flow.tokens = None

        def back(y: torch.Tensor) -> Flow:
            flow.x = flow.x + (y.to(flow.x.dtype) + shared).view(flow.x.shape)
            return flow

        return Started(pending, back)

    if not block.has_experts:
        return [(f"attention {layer}", attend), (f"dense {layer}", dense)]
    return [
        (f"attention {layer}", attend),
        (f"dispatch {layer}", dispatch),
        (f"experts {layer}", experts),
    ]


def model_stages(model: Model, recompute: bool = False) -> Stages:
    """Stages from ids to logits and drafts."""

    def embed(flow: Flow) -> Flow:
        flow.x, flow.span = model.embed_tokens(flow.ids), model.span(flow.ids.shape)
        return flow

    def head(flow: Flow) -> Flow:
        hidden = model.norm(flow.x)
        flow.logits = model.lm_head(hidden)
        if model.mtp is not None:
            following = flow.ids[:, 1:]
            flow.span = model.span(following.shape)
            flow.x = model.mtp.joined(hidden[:, :-1], model.embed_tokens(following))
        return flow

    def draft(flow: Flow) -> Flow:
        assert model.mtp is not None
        flow.drafts = model.lm_head(model.mtp.norm(flow.x))
        return flow

    stages: Stages = [("embed", embed)]
    for i, block in enumerate(model.layers):
        stages += block_stages(block, i, recompute)
    stages.append(("head", head))
    if model.mtp is not None:
        stages += [*block_stages(model.mtp.block, len(model.layers), recompute), ("draft", draft)]
    return stages


def run(
    model: Model, ids: torch.Tensor, *, overlap: bool = False, recompute: bool = False, trace: Any = None
) -> list[Flow]:
    """Run the model on ids [B, S]; return one Flow or, with overlap, those of the two halves. Collective."""
    stages = model_stages(model, recompute)
    if overlap:
        first, second = ids.tensor_split(2)
        return list(two_batches(stages, Flow(first), Flow(second), trace=trace))
    flow: Any = Flow(ids)
    for _, stage in stages:
        flow = stage(flow)
        if hasattr(flow, "wait"):
            flow = flow.wait()
    return [flow]
