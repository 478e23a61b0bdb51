"""Gates choose the experts of each token and their weights. Plain torch, differentiable through the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InvalidArgument


class Routing(NamedTuple):
    """The result of a gate: topk_ids int64 [T, top_k], topk_weights float32 [T, top_k], affinities float32 [T, E].

    If the tokens are float64, the affinities are float64 too.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    affinities: torch.Tensor


def group_limited_top_k(
    affinities: torch.Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    bias: torch.Tensor | None = None,
    group_terms: int = 2,
) -> torch.Tensor:
    """Choose the top_k experts of each token from its top_groups best groups of experts.

    Parameters
    ----------
    affinities : Tensor [T, E]
    top_k, num_groups, top_groups : int
        Experts form num_groups consecutive groups. If the experts of each group are on one node, a token goes
        to at most top_groups nodes.
    bias : Tensor [E], optional
        Added to the affinities for the choice only, not for the weights.
    group_terms : int
        A group's score is the sum of this many of its highest affinities (bias included): 2 in DeepSeek-V3, 1 in V2.

    Returns
    -------
    Tensor [T, top_k] int64
        Expert ids, in descending order of biased affinity.

    Raises
    ------
    InvalidArgument
        num_groups does not divide the number of experts, or the chosen groups hold fewer than top_k experts.

    Source: DeepSeek-V3 technical report, section 2.1.2, "auxiliary-loss-free load balancing" and "node-limited
    routing".
    """
    tokens, experts = affinities.shape
    if not 1 <= top_k <= experts:
        raise InvalidArgument(f"top_k is {top_k}; expected 1..{experts}, the number of experts", op="gate")
    if num_groups < 1 or experts % num_groups:
        raise InvalidArgument(
            f"num_groups is {num_groups}; expected a divisor of the {experts} experts", op="gate"
        )
    per_group = experts // num_groups
    if not 1 <= top_groups <= num_groups or top_groups * per_group < top_k:
        raise InvalidArgument(
            f"top_groups is {top_groups}; expected 1..{num_groups}, with at least top_k = {top_k} experts in them",
            op="gate",
        )
    scores = affinities if bias is None else affinities + bias
    if top_groups < num_groups:
        grouped = scores.view(tokens, num_groups, per_group)
        group_scores = grouped.topk(min(group_terms, per_group), dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(
            1, group_scores.topk(top_groups, dim=-1).indices, True
        )
        scores = grouped.masked_fill(~kept[:, :, None], -math.inf).view(tokens, experts)
    return scores.topk(top_k, dim=-1).indices


def sigmoid_gate(
    logits: torch.Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    bias: torch.Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route as DeepSeek-V3 does: sigmoid affinities, group-limited top-k, weights normalized over the chosen experts.

    Parameters
    ----------
    logits : Tensor [T, E]
    top_k, num_groups, top_groups, bias
        As for group_limited_top_k.
    normalize : bool
        Normalize the weights of each token, so that they sum to scale.
    scale : float
        Factor of the weights.

    Returns
    -------
    (topk_ids int64 [T, top_k], topk_weights float32 [T, top_k])

    Raises
    ------
    InvalidArgument
        As group_limited_top_k.

    Source: DeepSeek-V3 technical report, equations 13 to 16.
    """
    return _choose(logits.float().sigmoid(), top_k, num_groups, top_groups, bias, normalize, scale, 2)


def softmax_gate(
    logits: torch.Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route by softmax affinities over all experts, and top-k.

    Mixtral and Qwen3 normalize the weights over the chosen experts; DeepSeek-V2-Lite does not.

    Parameters
    ----------
    logits : Tensor [T, E]
    top_k, num_groups, top_groups
        As for group_limited_top_k. The score of a group is its highest affinity, as in DeepSeek-V2.
    normalize : bool
        Normalize the weights of each token, so that they sum to scale. This equals a softmax over the logits of the
        chosen experts alone.
    scale : float
        Factor of the weights.

    Returns
    -------
    (topk_ids int64 [T, top_k], topk_weights float32 [T, top_k])

    Raises
    ------
    InvalidArgument
        As group_limited_top_k.

    Source: Mixtral of Experts, section 2.1; DeepSeek-V2 technical report, section 2.2.
    """
    return _choose(logits.float().softmax(-1), top_k, num_groups, top_groups, None, normalize, scale, 1)


def _choose(
    affinities: torch.Tensor,
    top_k: int,
    num_groups: int,
    top_groups: int,
    bias: torch.Tensor | None,
    normalize: bool,
    scale: float,
    group_terms: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = group_limited_top_k(
        affinities.detach(),
        top_k,
        num_groups=num_groups,
        top_groups=top_groups,
        bias=bias,
        group_terms=group_terms,
    )
    weights = affinities.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def count_picks(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count the picks of each expert.

    Parameters
    ----------
    topk_ids : Tensor [..., top_k] int64
        -1 is not counted.
    num_experts : int

    Returns
    -------
    Tensor [num_experts] int64
    """
    ids = topk_ids.flatten() + 1
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids)
    )[1:]


@torch.no_grad()
def update_bias(bias: torch.Tensor, counts: torch.Tensor, speed: float) -> torch.Tensor:
    """Lower the bias of overloaded experts and raise that of underloaded ones, in place, after a training step.

    Parameters
    ----------
    bias : Tensor [E] float32 or float64
    counts : Tensor [E]
        Picks of each expert in the whole batch, over all ranks.
    speed : float
        The step, called gamma in the report. DeepSeek-V3 was mostly trained with 0.001.

    Returns
    -------
    Tensor [E]
        The tensor `bias` itself.

    Raises
    ------
    InvalidArgument
        bias is neither float32 nor float64: narrower types round the steps away.

    Source: DeepSeek-V3 technical report, section 2.1.2, "auxiliary-loss-free load balancing".
    """
    if bias.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"update_bias: bias is {bias.dtype}, which rounds steps of {speed} away; expected float32 or float64 "
            "(call keep_float32 on the module before it is cast)",
            op="update_bias",
        )
    counts = counts.to(torch.float64)
    return bias.add_(torch.sign(counts.mean() - counts).to(bias.dtype), alpha=speed)


def balance_loss(affinities: torch.Tensor, topk_ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """Compute DeepSeek-V3's sequence-wise balance loss, averaged over sequences.

    Parameters
    ----------
    affinities : Tensor [..., S, E]
        Affinities of the S tokens of each sequence; differentiable.
    topk_ids : Tensor [..., S, top_k] int64
        The picks; -1 is not counted.
    alpha : float
        Factor of the loss; 0.0001 in DeepSeek-V3.

    Returns
    -------
    Tensor []
        alpha * sum over experts of (fraction of picks, times E) * (mean normalized affinity), in float32 or wider.
        Without tokens it is 0 and still differentiable.

    Source: DeepSeek-V3 technical report, equations 17 to 20.
    """
    *batch, length, experts = affinities.shape
    sequences, top_k = math.prod(batch), topk_ids.shape[-1]
    affinities, ids = (
        affinities.reshape(sequences, length, experts),
        topk_ids.reshape(sequences, length, top_k),
    )
    affinities = affinities.to(
        torch.promote_types(affinities.dtype, torch.float32)
    )  # bfloat16 cannot count beyond 256
    picked = torch.zeros(len(ids), experts + 1, dtype=affinities.dtype, device=ids.device)
    picked.scatter_add_(1, ids.flatten(1) + 1, torch.ones_like(ids, dtype=affinities.dtype).flatten(1))
    # The divisors are at least 1: the mean of zero tokens would be NaN.
    fraction = picked[:, 1:] * (experts / (top_k * max(length, 1)))
    share = (affinities / (affinities.sum(-1, keepdim=True) + 1e-20)).sum(1) / max(length, 1)
    return alpha * (fraction * share).sum() / max(sequences, 1)


def _apply_keeping(
    names: Iterable[str], apply: Callable[..., Any], module: nn.Module, fn: Any, recurse: bool
) -> nn.Module:
    """Call Module._apply, then restore the named tensors to float32 with the bits from before the call."""
    before = {name: getattr(module, name).data for name in names}
    apply(module, fn, recurse)
    for name, value in before.items():
        now = getattr(module, name)
        # One call may move and cast, so the exact value is taken from before the call.
        if now.dtype != torch.float32:
            now.data = (
                torch.empty_like(now, dtype=torch.float32)
                if value.is_meta
                else value.to(now.device, torch.float32)
            )
    return module


def _widen(name: str, module: nn.Module, _: Any = None) -> None:
    """Convert a tensor of a module to float32, if a load has assigned one of another dtype."""
    value = getattr(module, name)
    if value.dtype != torch.float32:
        value.data = value.data.to(torch.float32)


class _Keeping:
    """Replaces a module's _apply. It is a class so that the module can be copied and pickled."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        return _apply_keeping((self.name,), type(self.module)._apply, self.module, fn, recurse)


def keep_float32(model: nn.Module, name: str) -> int:
    """Keep every buffer or parameter of this name in float32 through .to(dtype), .half(), .bfloat16() and loading.

    A narrower type loses the small steps of update_bias. Gate protects its own bias. Call this function for routers
    of other libraries, before the first cast; for transformers: keep_float32(model, "e_score_correction_bias").

    Parameters
    ----------
    model : torch.nn.Module
        This module and all its submodules are searched.
    name : str
        Name of the attribute. A tensor that is not float32 is converted now.

    Returns
    -------
    int
        Number of modules that have such a tensor.
    """
    found = 0
    for module in model.modules():
        if isinstance(getattr(module, name, None), torch.Tensor):
            found += 1
            _widen(name, module)
            if not isinstance(module, Gate):
                module._apply = _Keeping(module, name)  # type: ignore[method-assign]
                module.register_load_state_dict_post_hook(partial(_widen, name))
    return found


class Gate(nn.Module):
    """A gate with parameters: weight [E, hidden] and, for score="sigmoid", a bias [E] that is always float32.

    The bias takes part in the choice of experts only, not in the weights.

    Parameters
    ----------
    hidden, num_experts, top_k : int
    score : "sigmoid" or "softmax"
    num_groups, top_groups, normalize, scale
        As for sigmoid_gate and softmax_gate.

    Raises
    ------
    InvalidArgument
        score is neither of the two. A call raises it as group_limited_top_k does.

    Source: DeepSeek-V3 technical report, section 2.1.2.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "sigmoid",
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if score not in ("sigmoid", "softmax"):
            raise InvalidArgument(f"score is {score!r}; expected 'sigmoid' or 'softmax'", op="Gate")
        self.num_experts, self.top_k, self.score = num_experts, top_k, score
        self.num_groups, self.top_groups, self.normalize, self.scale = (
            num_groups,
            top_groups,
            normalize,
            scale,
        )
        device = torch.get_default_device()
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden, dtype=torch.get_default_dtype(), device=device)
        )
        nn.init.normal_(self.weight, std=hidden**-0.5)
        self.register_buffer(
            "bias",
            torch.zeros(num_experts, dtype=torch.float32, device=device) if score == "sigmoid" else None,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return _apply_keeping(() if self.bias is None else ("bias",), nn.Module._apply, self, fn, recurse)

    def _load_from_state_dict(self, *how: Any) -> None:
        super()._load_from_state_dict(*how)
        if self.bias is not None:  # load_state_dict(assign=True) assigns the tensor without a cast
            _widen("bias", self)

    def forward(self, x: torch.Tensor) -> Routing:
        """Route tokens x [T, hidden]. Computes in float32, also under autocast, or in float64 if x is float64."""
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.to(wide), self.weight.to(wide))
        sigmoid = self.score == "sigmoid"
        affinities = logits.sigmoid() if sigmoid else logits.softmax(-1)
        ids, weights = _choose(
            affinities,
            self.top_k,
            self.num_groups,
            self.top_groups,
            self.bias,
            self.normalize,
            self.scale,
            2 if sigmoid else 1,
        )
        return Routing(ids, weights.float(), affinities)

    def update_bias(self, counts: torch.Tensor, speed: float) -> torch.Tensor:
        """Call the function update_bias on this gate's bias."""
        return update_bias(self.bias, counts, speed)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Text of print(gate)."""
        return (
            f"{self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, "
            f"groups={self.top_groups}/{self.num_groups}, normalize={self.normalize}, scale={self.scale}"
        )
