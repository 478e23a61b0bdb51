"""Gates: which experts a token goes to, and with what weights. Plain torch, differentiable through the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InvalidArgument


class Routing(NamedTuple):
    """What a gate decides: topk_ids int64 [T, top_k], topk_weights float32 [T, top_k], affinities float32 [T, E]."""

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
    """Ids of the top_k experts of each token, taken from its top_groups best groups of experts.

    Parameters
    ----------
    affinities : Tensor [T, E]
    top_k, num_groups, top_groups : int
        Experts form num_groups consecutive groups; where a group's experts lie on one node, a token goes
        to at most top_groups nodes.
    bias : Tensor [E], optional
        Added for choosing only.
    group_terms : int
        A group's score is the sum of this many of its highest affinities (bias included): 2 in DeepSeek-V3, 1 in V2.

    Returns
    -------
    Tensor [T, top_k] int64
        In descending order of biased affinity.

    Raises
    ------
    InvalidArgument
        Groups do not divide the experts, or the chosen groups hold fewer than top_k experts.

    Source: DeepSeek-V3 technical report, section 2.1.2, "auxiliary-loss-free load balancing" and "node-limited routing".
    """
    tokens, experts = affinities.shape
    if not 1 <= top_k <= experts:
        raise InvalidArgument(f"top_k: got {top_k}; expected 1..{experts}", op="gate")
    if num_groups < 1 or experts % num_groups:
        raise InvalidArgument(
            f"num_groups: got {num_groups}; expected a divisor of the {experts} experts", op="gate"
        )
    per_group = experts // num_groups
    if not 1 <= top_groups <= num_groups or top_groups * per_group < top_k:
        raise InvalidArgument(
            f"top_groups: got {top_groups}; expected 1..{num_groups}, holding at least top_k = {top_k} experts",
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
    """DeepSeek-V3's gate: sigmoid affinities, group-limited top-k, weights normalized over the chosen experts.

    Parameters
    ----------
    logits : Tensor [T, E]
    top_k, num_groups, top_groups, bias
        As for group_limited_top_k.
    normalize : bool
        Weights of a token sum to scale.
    scale : float

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
    """Softmax affinities over all experts and top-k: Mixtral and Qwen3 normalize over the chosen ones, DeepSeek-V2-Lite does not.

    Parameters
    ----------
    logits : Tensor [T, E]
    top_k, num_groups, top_groups
        As for group_limited_top_k; a group's score is its highest affinity (DeepSeek-V2).
    normalize : bool
        Weights of a token sum to scale; that equals a softmax over the chosen logits alone.
    scale : float

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
    """How often each expert is picked: int64 [num_experts]; -1 counts nowhere.

    Parameters
    ----------
    topk_ids : Tensor [..., top_k] int64
    num_experts : int
    """
    ids = topk_ids.flatten() + 1
    return torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids, torch.ones_like(ids)
    )[1:]


@torch.no_grad()
def update_bias(bias: torch.Tensor, counts: torch.Tensor, speed: float) -> torch.Tensor:
    """Lower the bias of overloaded experts by speed and raise that of underloaded ones, in place, after a training step.

    Parameters
    ----------
    bias : Tensor [E] float32 or float64
    counts : Tensor [E]
        Picks of each expert in the whole batch: of all ranks.
    speed : float
        Gamma: 0.001 for most of DeepSeek-V3's training.

    Returns
    -------
    Tensor [E]
        bias.

    Raises
    ------
    InvalidArgument
        bias has a dtype in which a step of this size is rounded away.

    Source: DeepSeek-V3 technical report, section 2.1.2, "auxiliary-loss-free load balancing".
    """
    if bias.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"update_bias: bias is {bias.dtype}, which loses steps of {speed}; expected float32 or float64 "
            "(keep_float32 keeps a module's bias so)",
            op="update_bias",
        )
    counts = counts.to(torch.float64)
    return bias.add_(torch.sign(counts.mean() - counts).to(bias.dtype), alpha=speed)


def balance_loss(affinities: torch.Tensor, topk_ids: torch.Tensor, alpha: float) -> torch.Tensor:
    """The complementary balance loss of each sequence, averaged over sequences.

    Parameters
    ----------
    affinities : Tensor [..., S, E]
        Of S tokens of a sequence; differentiable.
    topk_ids : Tensor [..., S, top_k] int64
        The picks; -1 counts nowhere.
    alpha : float
        0.0001 in DeepSeek-V3.

    Returns
    -------
    Tensor []
        alpha * sum over experts of (fraction of picks, times E) * (mean normalized affinity), in float32 or wider.
        Without tokens it is 0, and its gradient exists.

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
    )  # bfloat16 counts to 256 only
    picked = torch.zeros(len(ids), experts + 1, dtype=affinities.dtype, device=ids.device)
    picked.scatter_add_(1, ids.flatten(1) + 1, torch.ones_like(ids, dtype=affinities.dtype).flatten(1))
    # Sums over at least one token and one sequence: the mean of nothing would be NaN.
    fraction = picked[:, 1:] * (experts / (top_k * max(length, 1)))
    share = (affinities / (affinities.sum(-1, keepdim=True) + 1e-20)).sum(1) / max(length, 1)
    return alpha * (fraction * share).sum() / max(sequences, 1)


def _apply_keeping(
    names: Iterable[str], apply: Callable[..., Any], module: nn.Module, fn: Any, recurse: bool
) -> nn.Module:
    """Module._apply, after which the named tensors are float32 again, with the bits that they had before."""
    before = {name: getattr(module, name).data for name in names}
    apply(module, fn, recurse)
    for name, value in before.items():
        now = getattr(module, name)
        if (
            now.dtype != torch.float32
        ):  # a move and a cast are one function: what the cast rounded away comes from before it
            now.data = (
                torch.empty_like(now, dtype=torch.float32)
                if value.is_meta
                else value.to(now.device, torch.float32)
            )
    return module


def _widen(name: str, module: nn.Module, _: Any = None) -> None:
    """Make a tensor of a module float32, where a load has assigned one of another dtype."""
    value = getattr(module, name)
    if value.dtype != torch.float32:
        value.data = value.data.to(torch.float32)


class _Keeping:
    """Takes the place of a module's _apply. A class, so that the module can be copied and pickled."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        return _apply_keeping((self.name,), type(self.module)._apply, self.module, fn, recurse)


def keep_float32(model: nn.Module, name: str) -> int:
    """Keep every buffer or parameter of this name in float32 through .to(dtype), .half(), .bfloat16() and loading.

    Steps of update_bias are lost in a narrower type. Gate does this for its own bias; call it for routers of other libraries
    (transformers: keep_float32(model, "e_score_correction_bias")), before the first cast.

    Parameters
    ----------
    model : torch.nn.Module
        It and its submodules are searched.
    name : str
        Of the attribute; what is not float32 yet is converted now.

    Returns
    -------
    int
        Modules that have it.
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
    """A gate with parameters: weight [E, hidden], and a bias [E] for choosing only (score="sigmoid"), always float32.

    Parameters
    ----------
    hidden, num_experts, top_k : int
    score : "sigmoid" or "softmax"
    num_groups, top_groups, normalize, scale
        As for sigmoid_gate and softmax_gate.

    Raises
    ------
    InvalidArgument
        score is neither; the rest as group_limited_top_k, when called.

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
            raise InvalidArgument(f"score: got {score!r}; expected 'sigmoid' or 'softmax'", op="Gate")
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
        if self.bias is not None:  # load_state_dict(assign=True) takes the tensor as it is
            _widen("bias", self)

    def forward(self, x: torch.Tensor) -> Routing:
        """Routing of tokens x [T, hidden]; computed in float32, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())
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
        return Routing(ids, weights, affinities)

    def update_bias(self, counts: torch.Tensor, speed: float) -> torch.Tensor:
        """As the function of this name, on this gate's bias."""
        return update_bias(self.bias, counts, speed)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What print(gate) says."""
        return (
            f"{self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, "
            f"groups={self.top_groups}/{self.num_groups}, normalize={self.normalize}, scale={self.scale}"
        )
