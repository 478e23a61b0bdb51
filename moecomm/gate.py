"""Gates: which experts a token goes to, and with what weights. Plain torch, differentiable through the weights."""

from __future__ import annotations

import torch

from .errors import InvalidArgument


def group_limited_top_k(affinities, top_k, *, num_groups=1, top_groups=1, bias=None):
    """Ids of the top_k experts of each token, taken from its top_groups best groups of experts.

    Parameters
    ----------
    affinities : Tensor [T, E]
    top_k, num_groups, top_groups : int
        Experts form num_groups consecutive groups; a group's score is the sum of its two highest affinities.
    bias : Tensor [E], optional
        Added for choosing only.

    Returns
    -------
    Tensor [T, top_k] int64
        In descending order of biased affinity.

    Raises
    ------
    InvalidArgument
        Groups do not divide the experts, or the chosen groups hold fewer than top_k experts.

    Source: DeepSeek-V3 technical report, section 2.1.2 (bias) and section 2.1.2, node-limited routing.
    """
    tokens, experts = affinities.shape
    if num_groups < 1 or experts % num_groups:
        raise InvalidArgument(f"num_groups: got {num_groups}; expected a divisor of the {experts} experts", op="gate")
    if not 1 <= top_groups <= num_groups or top_groups * (experts // num_groups) < top_k:
        raise InvalidArgument(f"top_groups: got {top_groups}; expected 1..{num_groups}, holding at least top_k = {top_k} experts", op="gate")
    scores = affinities if bias is None else affinities + bias
    if top_groups < num_groups:
        grouped = scores.view(tokens, num_groups, -1)
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, group_scores.topk(top_groups, dim=-1).indices, True)
        scores = grouped.masked_fill(~kept[:, :, None], float("-inf")).view(tokens, experts)
    return scores.topk(top_k, dim=-1).indices


def sigmoid_gate(logits, top_k, *, num_groups=1, top_groups=1, bias=None, normalize=True, scale=1.0):
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
    affinities = logits.float().sigmoid()
    ids = group_limited_top_k(affinities.detach(), top_k, num_groups=num_groups, top_groups=top_groups, bias=bias)
    weights = affinities.gather(1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return ids, weights * scale
