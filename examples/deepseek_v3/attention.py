"""Multi-head Latent Attention: compressed queries, keys and values, and a shared key with the rotary embedding."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own spelling

from .cache import Cache
from .config import Config


def inverse_frequencies(config: Config) -> torch.Tensor:
    """Rotation of each pair of elements in radians per token, float32 [rope / 2].

    YaRN divides slow frequencies by its factor, keeps fast ones, and interpolates linearly between them.
    Source: YaRN (Peng et al.), section 3.2; technical report, section 4.3.
    """
    exponents = torch.arange(0, config.rope, 2, dtype=torch.float32) / config.rope
    plain = config.rope_theta**-exponents
    if config.yarn is None:
        return plain
    yarn = config.yarn

    def pair_with(rotations: float) -> float:
        # Index i of the pair with this number of rotations: original * theta^(-2i / rope) = 2 pi * rotations.
        return (
            config.rope
            * math.log(yarn.original / (rotations * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_with(yarn.beta)), 0)
    high = min(math.ceil(pair_with(yarn.alpha)), config.rope - 1)
    pairs = torch.arange(config.rope // 2, dtype=torch.float32)
    slow = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - slow) + plain / yarn.factor * slow


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or unchanged if it is float64."""
    return x if x.dtype is torch.float64 else x.float()


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [..., rope] by angles [..., rope / 2], in float32 or wider."""
    even, odd = _wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    angles = angles.to(even.dtype)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class MLA(nn.Module):
    """Attention of one layer. Its weights have the names and shapes of transformers' DeepseekV3.

    Parameters
    ----------
    config : Config
        With tensor parallelism, heads is this rank's number of heads, and the caller sums the results over ranks.

    Source: technical report, section 2.1.1; absorbed form: DeepSeek-V2, section 2.1.2 and appendix C.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        self.q_a_proj = nn.Linear(c.hidden, c.q_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(c.q_rank, eps=c.norm_eps)
        self.q_b_proj = nn.Linear(c.q_rank, c.heads * (c.nope + c.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden, c.kv_rank + c.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(c.kv_rank, eps=c.norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_rank, c.heads * (c.nope + c.value), bias=False)
        self.o_proj = nn.Linear(c.heads * c.value, c.hidden, bias=False)
        self.q_scale = math.sqrt(c.hidden / c.q_rank) if c.bottleneck_scale else 1.0
        self.kv_scale = math.sqrt(c.hidden / c.kv_rank) if c.bottleneck_scale else 1.0

    def project(
        self, x: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x [B, S, hidden] to queries [B, S, heads, nope] and [B, S, heads, rope], and to rows of the cache.

        The rows [B, S, kv_rank + rope] contain the normalized latent and the rotated shared key.
        """
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)) * self.q_scale)
        q_nope, q_rope = q.unflatten(-1, (-1, c.nope + c.rope)).split([c.nope, c.rope], -1)
        latent, key = self.kv_a_proj_with_mqa(x).split([c.kv_rank, c.rope], -1)
        rows = torch.cat((self.kv_a_layernorm(latent) * self.kv_scale, rotate(key, angles)), -1)
        return q_nope, rotate(q_rope, angles[:, :, None]), rows

    def attend(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attend with explicit keys and values of all rows: [B, S, heads * value].

        mask is bool [B, S, L]; None means causal.
        """
        c = self.config
        latent, key = rows.split([c.kv_rank, c.rope], -1)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (-1, c.nope + c.value)).split([c.nope, c.value], -1)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, key[:, :, None].expand(*k_nope.shape[:3], -1)), -1)
        # With equal widths torch uses a kernel that does not store the matrix of scores.
        width = max(q.shape[-1], c.value)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, None if mask is None else mask[:, None], is_causal=mask is None, scale=scale
        )
        return y[..., : c.value].transpose(1, 2).flatten(2)

    def attend_absorbed(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Compute the same without keys and values: the up-projections are applied to the query and to the result."""
        c = self.config
        up = self.kv_b_proj.weight.view(-1, c.nope + c.value, c.kv_rank)
        w_key, w_value = up.split([c.nope, c.value], 1)
        latent = rows[..., : c.kv_rank]
        q = torch.cat((torch.einsum("bshn,hnk->bshk", q_nope, w_key), q_rope), -1)
        scores = torch.einsum("bshk,blk->bhsl", _wide(q), _wide(rows)) * scale
        weights = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1).to(rows.dtype)
        y = torch.einsum("bhsl,blk->bshk", weights, latent)
        return torch.einsum("bshk,hvk->bshv", y, w_value).flatten(2)

    def forward(
        self,
        x: torch.Tensor,
        angles: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        kept: tuple[Cache, int, torch.Tensor, torch.Tensor] | None = None,
        absorbed: bool = False,
    ) -> torch.Tensor:
        """x [B, S, hidden] -> [B, S, hidden].

        Parameters
        ----------
        x : Tensor [B, S, hidden]
        angles : Tensor [B, S, rope / 2]
        mask : bool [B, S, L], optional
            The rows that each token attends to. None: causal attention within x.
        scale : float
            Factor of the scores.
        kept : (Cache, layer, slots [B], positions [B, S]), optional
            Store the new rows in the cache, and attend to its rows up to the last position.
        absorbed : bool
            Use attend_absorbed.
        """
        if not x.numel():  # a rank without a sequence takes part in dispatch and combine only
            return x
        q_nope, q_rope, rows = self.project(x, angles)
        if kept is not None:
            cache, layer, slots, positions = kept
            rows = cache.write(layer, slots, positions, rows)
        if absorbed:
            if mask is None:
                mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()[None]
            return self.o_proj(self.attend_absorbed(q_nope, q_rope, rows, mask, scale))
        return self.o_proj(self.attend(q_nope, q_rope, rows, mask, scale))
