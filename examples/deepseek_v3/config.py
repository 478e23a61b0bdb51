"""Configuration of the model. Presets: TINY for tests, MINI for two CPU cores, PUBLISHED as in the technical report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecomm import presets
from moecomm.errors import InvalidArgument

PUBLISHED_HIDDEN, PUBLISHED_STD = 7168, 0.006


@dataclass(frozen=True)
class Yarn:
    """YaRN for the decoupled keys: extends the context by a factor.

    Attributes
    ----------
    original : int
        Context length of the training.
    factor : float
        Extension of the context.
    alpha, beta : float
        A frequency with fewer than alpha rotations over `original` is interpolated; one with more than beta is kept.

    Source: technical report, section 4.3.
    """

    original: int
    factor: float = 40.0
    alpha: float = 1.0
    beta: float = 32.0

    @property
    def temperature(self) -> float:
        """sqrt(t) = 0.1 ln(factor) + 1. Scores are multiplied by its square."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Config:
    """Configuration of the model. Parentheses contain the names of transformers' DeepseekV3Config.

    Attributes
    ----------
    hidden (hidden_size), layers (num_hidden_layers) : int
    dense_layers (first_k_dense_replace) : int
        Number of first layers without experts.
    q_rank, kv_rank (q_lora_rank, kv_lora_rank) : int
        Widths of the compressed query and of the compressed latent.
    nope, rope, value (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) : int
        Widths per head.
    intermediate, expert_intermediate (intermediate_size, moe_intermediate_size) : int
    num_groups, top_groups (n_group, topk_group) : int
        A token goes to experts of top_groups groups. A group is one node.
    scale (routed_scaling_factor) : float
    mtp : bool
        Whether the model has a module for multi-token prediction.
    bottleneck_scale : bool
        Multiply the latents by sqrt(hidden / rank). The weights of their norms could contain this factor as well.
    """

    vocab_size: int = 512
    hidden: int = 128
    layers: int = 3
    dense_layers: int = 1
    heads: int = 4
    q_rank: int = 64
    kv_rank: int = 32
    nope: int = 32
    rope: int = 16
    value: int = 32
    intermediate: int = 256
    expert_intermediate: int = 64
    num_experts: int = 16
    top_k: int = 4
    shared_experts: int = 1
    num_groups: int = 4
    top_groups: int = 2
    scale: float = 2.5
    mtp: bool = True
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-6
    init_std: float = PUBLISHED_STD
    bottleneck_scale: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other, before a forward pass fails."""
        for name in ("vocab_size", "hidden", "layers", "heads", "q_rank", "kv_rank", "nope", "rope", "value"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}; expected an int >= 1", op="Config")
        if self.rope % 2:
            raise InvalidArgument(f"rope is {self.rope}; expected an even number", op="Config")
        if not 0 <= self.dense_layers <= self.layers:
            raise InvalidArgument(
                f"dense_layers is {self.dense_layers}; expected 0..{self.layers}, the number of layers",
                op="Config",
            )
        if self.num_experts % self.num_groups:
            raise InvalidArgument(
                f"num_groups is {self.num_groups}; expected a divisor of the {self.num_experts} experts",
                op="Config",
            )

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts, including that of the MTP module."""
        return self.layers - self.dense_layers + self.mtp

    @property
    def cache_width(self) -> int:
        """Elements of the cache per token and layer: the compressed latent and the rotated shared key."""
        return self.kv_rank + self.rope

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return (self.nope + self.rope) ** -0.5 * (self.yarn.temperature**2 if self.yarn else 1.0)


def same_gain(hidden: int) -> float:
    """Initial standard deviation that gives a projection of `hidden` elements the gain of the published model."""
    return PUBLISHED_STD * math.sqrt(PUBLISHED_HIDDEN / hidden)


TINY = Config(
    vocab_size=64,
    hidden=32,
    heads=2,
    q_rank=16,
    kv_rank=16,
    nope=8,
    rope=8,
    value=8,
    intermediate=48,
    expert_intermediate=16,
    num_experts=8,
    top_k=3,
    init_std=same_gain(32),
)
# Twice the published gain, so that attention is not uniform at the start. Then a few hundred steps are enough.
MINI = Config(
    hidden=64,
    heads=2,
    q_rank=48,
    nope=16,
    value=16,
    intermediate=128,
    expert_intermediate=32,
    init_std=2 * same_gain(64),
    bottleneck_scale=True,
)

_moe = presets.deepseek_v3
# Source: technical report, sections 4.2 and 4.3.
PUBLISHED = Config(
    vocab_size=129280,
    hidden=_moe.hidden,
    layers=61,
    dense_layers=61 - _moe.moe_layers,
    heads=128,
    q_rank=1536,
    kv_rank=512,
    nope=128,
    rope=64,
    value=128,
    intermediate=18432,
    expert_intermediate=_moe.intermediate,
    num_experts=_moe.num_experts,
    top_k=_moe.top_k,
    shared_experts=_moe.shared_experts,
    num_groups=_moe.num_groups,
    top_groups=_moe.top_groups,
    scale=_moe.scale,
    yarn=Yarn(original=4096),
)
