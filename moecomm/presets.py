"""Published model shapes, so that benchmarks and plans can name them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's MoE layers: hidden elements, routed experts, picks per token, groups of the gate."""

    hidden: int
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1


deepseek_v3 = ModelShape(hidden=7168, num_experts=256, top_k=8, num_groups=8, top_groups=4)
