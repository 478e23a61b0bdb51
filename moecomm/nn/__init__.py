"""Layers on top of dispatch and combine: MoE layer, experts, gates, and the overlap of two micro-batches."""

from .experts import Experts
from .layer import MoE, SwiGLU
from .parallel import clip_grad_norm_, exclude_experts

__all__ = ["Experts", "MoE", "SwiGLU", "clip_grad_norm_", "exclude_experts"]
