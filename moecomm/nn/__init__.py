"""Layers over dispatch and combine: MoE, experts, gates, and two micro-batches that overlap."""

from .layer import Experts, MoE, SwiGLU

__all__ = ["Experts", "MoE", "SwiGLU"]
