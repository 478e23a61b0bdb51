"""The model: latent attention, dense first layers, Mixture-of-Experts layers, multi-token prediction.

    model = Model(config)                          # one process, no communicator model = Model(config,
    buffer=make_buffer(comm, config, max_tokens))       # experts over ranks: calls are collective

    out = model(ids)                               # training and scoring: causal over ids [B, S]
    out = model(ids, cache=cache, slots=slots)     # prefill and decode: ids follow the tokens in the cache
    draft = model.predict_next(out.hidden, next_ids, ...)   # MTP: logits of the token after next_ids

Parameters have the names of the published checkpoint, without "model." and with "mtp" for the MTP module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

import moecomm
from moecomm.errors import InvalidArgument
from moecomm.gate import Gate, Routing
from moecomm.nn import Experts, SwiGLU

from .attention import MLA, inverse_frequencies
from .cache import Cache
from .config import Config, Yarn
from .moe import OneProcess, over_ranks


class Output(NamedTuple):
    """Result of the model.

    Attributes
    ----------
    logits : Tensor [B, S, vocab]
    hidden : Tensor [B, S, hidden]
        Input of the head and of MTP.
    routings : list of Routing
        One per layer with experts.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    routings: list[Routing]


class Span(NamedTuple):
    """Positions of the tokens of one call, shared by all layers.

    Attributes
    ----------
    positions : Tensor int64 [B, S]
        -1 marks padding.
    angles : Tensor [B, S, rope / 2]
    mask : Tensor bool [B, S, L] or None
        None: causal.
    real : Tensor bool [B, S] or None
        Tokens that are not padding. None: there is no padding.
    cache, slots, absorbed
        As for Model.forward.
    scale : float
        Factor of the attention scores.
    """

    positions: torch.Tensor
    angles: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor | None
    cache: Cache | None
    slots: torch.Tensor | None
    absorbed: bool
    scale: float


class Block(nn.Module):
    """Attention and a dense or Mixture-of-Experts layer, each with a norm and a residual."""

    def __init__(self, config: Config, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = mlp

    @property
    def has_experts(self) -> bool:
        """Whether the block has a Mixture-of-Experts layer."""
        return not isinstance(self.mlp, SwiGLU)

    def attention(self, x: torch.Tensor, span: Span, layer: int) -> torch.Tensor:
        """Attention of x [B, S, hidden] after the norm, without the residual."""
        return self.attend(self.input_layernorm(x), span, layer)

    def attend(self, x: torch.Tensor, span: Span, layer: int) -> torch.Tensor:
        """Attention of x [B, S, hidden], to which the norm has been applied, without the residual."""
        kept = (
            None
            if span.cache is None or span.slots is None
            else (span.cache, layer, span.slots, span.positions)
        )
        return self.self_attn(x, span.angles, span.mask, span.scale, kept, span.absorbed)

    def forward(self, x: torch.Tensor, span: Span, layer: int) -> tuple[torch.Tensor, Routing | None]:
        """x [B, S, hidden] -> (output [B, S, hidden], Routing or None). Padding is not sent to experts."""
        x = x + self.attention(x, span, layer)
        tokens = self.post_attention_layernorm(x)
        if not self.has_experts:
            return x + self.mlp(tokens), None
        if span.real is None:
            y, routing = self.mlp(tokens, with_routing=True)
            return x + y, routing
        y, routing = self.mlp(tokens[span.real], with_routing=True)
        return x.index_put(span.real.nonzero(as_tuple=True), x[span.real] + y), routing


class MTP(nn.Module):
    """Multi-token prediction of depth 1: one more block on a token's state and the embedding of the next token.

    Embedding and head are shared with the model. The projection takes (embedding, state), as in the published
    checkpoint; the report has (state, embedding). Source: technical report, section 2.2.
    """

    def __init__(self, config: Config, mlp: nn.Module) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.hnorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden, config.hidden, bias=False)
        self.block = Block(config, mlp)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def joined(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Input of the block, [B, S, hidden]."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))


class Model(nn.Module):
    """DeepSeek-V3 at any size.

    Parameters
    ----------
    config : Config
    buffer : moecomm.Buffer, optional
        Distribute the experts over the ranks of the Buffer. Every call is then collective. Default: all experts are
        in this process.
    make_moe : callable, optional
        Makes the Mixture-of-Experts layers: make_moe(config) -> module, called as module(tokens, with_routing=True).

    Source: DeepSeek-V3 technical report, section 2.
    """

    def __init__(
        self,
        config: Config,
        buffer: moecomm.Buffer | None = None,
        make_moe: Callable[[Config], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config

        def experts() -> nn.Module:
            if make_moe is not None:
                return make_moe(config)
            return OneProcess(config) if buffer is None else over_ranks(config, buffer)

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(
            Block(
                config,
                SwiGLU(config.hidden, config.intermediate) if i < config.dense_layers else experts(),
            )
            for i in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.mtp = MTP(config, experts()) if config.mtp else None
        self.set_yarn(config.yarn)

    def set_yarn(self, yarn: Yarn | None) -> None:
        """Extend the context by YaRN. Parameters do not change."""
        self.config = replace(self.config, yarn=yarn)
        self._frequencies = inverse_frequencies(self.config)

    def span(
        self,
        shape: torch.Size,
        cache: Cache | None = None,
        slots: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        absorbed: bool | None = None,
    ) -> Span:
        """Make the Span of a call with ids of this shape [B, S]. Other arguments are those of forward.

        Raises
        ------
        InvalidArgument
            slots or positions have another shape, or a position exceeds the cache.
        """
        plain = positions is None and cache is None
        if cache is not None:
            slots = torch.arange(shape[0]) if slots is None else slots
            if tuple(slots.shape) != (shape[0],):
                raise InvalidArgument(
                    f"slots has shape {list(slots.shape)}; expected [{shape[0]}], one slot per row of ids",
                    op="Model",
                )
        if positions is None:
            positions = torch.arange(shape[1]).expand(shape)
            if cache is not None and slots is not None:
                positions = positions + cache.lengths[slots][:, None]
        if positions.shape != shape:
            raise InvalidArgument(
                f"positions has shape {list(positions.shape)}; expected {list(shape)}, the shape of ids",
                op="Model",
            )
        last = int(positions.max()) + 1 if positions.numel() else 0
        if cache is not None and last > cache.max_length:
            raise InvalidArgument(
                f"positions has {last - 1}; expected less than {cache.max_length}, max_length of the cache",
                op="Model",
            )
        real = positions >= 0
        mask = None
        if not plain:
            keys = torch.arange(last).expand(shape[0], last) if cache is not None else positions
            mask = (keys[:, None] <= positions[:, :, None]) & (keys >= 0)[:, None]
            # Padding attends to everything, because softmax needs at least one score.
            mask = mask | ~real[:, :, None]
        angles = positions.clamp(min=0)[:, :, None].float() * self._frequencies
        if absorbed is None:
            absorbed = cache is not None and shape[1] <= 4
        padded = None if plain or bool(real.all()) else real
        return Span(positions, angles, mask, padded, cache, slots, absorbed, self.config.attention_scale)

    def forward(
        self,
        ids: torch.Tensor,
        *,
        cache: Cache | None = None,
        slots: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        absorbed: bool | None = None,
    ) -> Output:
        """Compute the logits of the tokens that follow ids.

        Parameters
        ----------
        ids : Tensor [B, S] int64
        cache : Cache, optional
            Store the new rows in the cache, and attend to all its rows.
        slots : Tensor [B] int64, optional
            Slot of the cache for each row of ids. Default: 0 .. B - 1.
        positions : Tensor [B, S] int64, optional
            -1 marks padding at the end of a row, which is not stored, attended to, or sent to experts. Default:
            consecutive positions from the lengths of the slots, or from 0.
        absorbed : bool, optional
            Attend without explicit keys and values. Default: True for at most 4 tokens per row with a cache.

        Returns
        -------
        Output

        Raises
        ------
        InvalidArgument
            As span.
        """
        span = self.span(ids.shape, cache, slots, positions, absorbed)
        x, routings = self.embed_tokens(ids), []
        for i, block in enumerate(self.layers):
            x, routing = block(x, span, i)
            if routing is not None:
                routings.append(routing)
        if cache is not None and span.slots is not None and span.positions.numel():
            lengths = span.positions.max(1).values + 1
            cache.lengths[span.slots] = torch.where(lengths > 0, lengths, cache.lengths[span.slots])
        hidden = self.norm(x)
        return Output(self.lm_head(hidden), hidden, routings)

    def predict_next(
        self,
        hidden: torch.Tensor,
        next_ids: torch.Tensor,
        *,
        cache: Cache | None = None,
        slots: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        absorbed: bool | None = None,
    ) -> Output:
        """Compute with MTP the logits of the tokens that follow next_ids.

        Parameters
        ----------
        hidden : Tensor [B, S, hidden]
            Output.hidden of S consecutive tokens.
        next_ids : Tensor [B, S] int64
            The token after each of them.
        cache, slots, positions, absorbed
            As for forward, with the positions of the tokens of `hidden`. A cache requires positions, because its
            lengths count the tokens of forward. This call does not change the lengths.

        Raises
        ------
        InvalidArgument
            The model has no MTP module, or positions are missing.
        """
        if self.mtp is None:
            raise InvalidArgument(
                "predict_next: the model has no MTP module; expected Config(mtp=True)", op="Model"
            )
        if cache is not None and positions is None:
            raise InvalidArgument(
                "predict_next: positions is None; expected the positions of the tokens of hidden", op="Model"
            )
        span = self.span(next_ids.shape, cache, slots, positions, absorbed)
        x = self.mtp.joined(hidden, self.embed_tokens(next_ids))
        x, routing = self.mtp.block(x, span, self.config.layers)
        hidden = self.mtp.norm(x)
        return Output(self.lm_head(hidden), hidden, [] if routing is None else [routing])

    @torch.no_grad()
    def initialize(self, seed: int) -> Model:
        """Initialize all parameters, equally for any number of ranks: each tensor and expert has its own generator."""
        for name, parameter in self.named_parameters():
            if name.endswith(("layernorm.weight", "norm.weight")):
                parameter.fill_(1.0)
            elif not name.endswith(("experts.gate_up", "experts.down")):
                _normal(parameter, self.config.init_std, seed, name)
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                for i in range(module.count):
                    for kind, p in (("gate_up", module.gate_up), ("down", module.down)):
                        _normal(p[i], self.config.init_std, seed, f"{name}.{module.first + i}.{kind}")
            elif isinstance(module, Gate) and module.bias is not None:
                module.bias.zero_()
        return self


def _normal(tensor: torch.Tensor, std: float, seed: int, name: str) -> Any:
    generator = torch.Generator().manual_seed(hash_of(f"{seed}/{name}"))
    return tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def hash_of(text: str) -> int:
    """A number below 2**62 that depends on the text alone. Python's hash() differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2
