"""Published model shapes and deployments, by name, for benchmarks, tests and the planner."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the MoE layers of a model.

    Attributes
    ----------
    hidden, intermediate : int
        Elements of a token, and inside an expert.
    num_experts, top_k : int
        Routed experts, and picks per token.
    num_groups, top_groups, score, normalize, scale
        Parameters of the gate, see moecomm.gate.
    shared_experts : int
        Experts that every token visits in addition to its picks.
    moe_layers : int
        Number of layers with experts.
    """

    hidden: int
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    intermediate: int = 0
    shared_experts: int = 0
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    moe_layers: int = 0


@dataclass(frozen=True)
class Deployment:
    """A deployment of a model on ranks, for Buffer(num_experts=experts, top_k=top_k, hidden=model.hidden).

    Attributes
    ----------
    model : ModelShape
    ranks, ranks_per_node : int
    experts : int
        Expert slots over all ranks. More than the routed experts of the model, if busy experts have several replicas
        or the shared expert is routed.
    top_k : int
        Picks per token, including that of a routed shared expert.
    """

    model: ModelShape
    ranks: int
    ranks_per_node: int
    experts: int
    top_k: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.ranks // self.ranks_per_node

    @property
    def experts_per_rank(self) -> int:
        """Expert slots per rank."""
        return self.experts // self.ranks


def shape_of(name: str) -> ModelShape:
    """Return the ModelShape of this name. Dashes and underscores are equivalent.

    Raises
    ------
    InvalidArgument
        The name is unknown.
    """
    found: ModelShape | None = globals().get(name.replace("-", "_")) if isinstance(name, str) else None
    known = sorted(n.replace("_", "-") for n, shape in globals().items() if isinstance(shape, ModelShape))
    require(isinstance(found, ModelShape), "presets", "model", name, f"one of {', '.join(known)}")
    assert found is not None
    return found


# Source: DeepSeek-V3 technical report, section 4.2.
deepseek_v3 = ModelShape(
    hidden=7168,
    num_experts=256,
    top_k=8,
    num_groups=8,
    top_groups=4,
    intermediate=2048,
    shared_experts=1,
    score="sigmoid",
    scale=2.5,
    moe_layers=58,
)
# Source: DeepSeek-V2 technical report, appendix B.
deepseek_v2_lite = ModelShape(
    hidden=2048, num_experts=64, top_k=6, intermediate=1408, shared_experts=2, normalize=False, moe_layers=26
)
# Source: Mixtral of Experts, table 1.
mixtral_8x7b = ModelShape(hidden=4096, num_experts=8, top_k=2, intermediate=14336, moe_layers=32)
# Source: Mixtral 8x22B, model card.
mixtral_8x22b = ModelShape(hidden=6144, num_experts=8, top_k=2, intermediate=16384, moe_layers=56)
# Source: Qwen3 technical report, table 2, and model cards.
qwen3_30b_a3b = ModelShape(hidden=2048, num_experts=128, top_k=8, intermediate=768, moe_layers=48)
qwen3_235b_a22b = ModelShape(hidden=4096, num_experts=128, top_k=8, intermediate=1536, moe_layers=94)

# Source: DeepSeek-V3 technical report, section 3.2 (64-way expert parallelism over 8 nodes).
deepseek_v3_training = Deployment(deepseek_v3, ranks=64, ranks_per_node=8, experts=256, top_k=8)
# Source: section 3.4.1: 32 ranks in 4 nodes and 32 redundant experts: 8 experts and a further replica on each rank.
deepseek_v3_prefill = Deployment(deepseek_v3, ranks=32, ranks_per_node=8, experts=288, top_k=8)
# Source: section 3.4.2: 320 ranks in 40 nodes, one expert each; 64 ranks hold redundant and shared experts, and the
# shared expert is a ninth pick.
deepseek_v3_decode = Deployment(deepseek_v3, ranks=320, ranks_per_node=8, experts=320, top_k=9)
