"""Experts that compute in BF16 or FP8, with FP32 weights.

In FP8, tokens are sent as e4m3 with one scale per 1 x 128 tile, and weights have one scale per 128 x 128 block. Every
128 elements the partial product is scaled and added to an FP32 sum. For the gradient of the weights, rows are
quantized in 128 x 1 tiles, along the tokens that are summed. On a CPU the partial products are computed in FP32.
Source: technical report, sections 3.3.1 to 3.3.3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own spelling

import moecomm
from moecomm import quant
from moecomm.nn import Experts, MoE
from moecomm.nn.grouped import grouped_mm

from .config import Config
from .moe import make_gate

TILE = quant.TILE


def promoted_product(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor
) -> torch.Tensor:
    """Product of FP8 codes a [M, K] and b [N, K] transposed, summed tile by tile in FP32: [M, N].

    a_scales is [M, K / 128]; b_scales is [N, K / 128], or [N / 128, K / 128] for blocks.
    """
    if len(b_scales) != len(b):
        b_scales = b_scales.repeat_interleave(TILE, 0)[: len(b)]
    total = torch.zeros(len(a), len(b))
    for i in range(a_scales.shape[1]):
        part = slice(i * TILE, (i + 1) * TILE)
        total += a[:, part].float() @ b[:, part].float().T * a_scales[:, i, None] * b_scales[:, i]
    return total


class Fp8Linear(torch.autograd.Function):
    """Linear layer of each expert, weights [experts, out, in]: forward and both gradients multiply FP8 codes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows [N, in] -> BF16 [N, out]."""
        codes, scales = quant.quantize(x)
        ctx.save_for_backward(codes, scales, w, counts)
        y = torch.zeros(len(x), w.shape[1])
        for rows, expert in _groups(counts):
            y[rows] = promoted_product(codes[rows], scales[rows], *_blocks(w[expert]))
        return y.to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of rows and weights."""
        codes, scales, w, counts = ctx.saved_tensors
        dy = dy.contiguous()
        dy_codes, dy_scales = quant.quantize(dy)
        dx, dw = torch.zeros(codes.shape), torch.zeros_like(w)
        for rows, expert in _groups(counts):
            dx[rows] = promoted_product(dy_codes[rows], dy_scales[rows], *_blocks(w[expert].T.contiguous()))
            x = quant.dequantize(codes[rows], scales[rows], dtype=torch.float32)
            dw[expert] = promoted_product(*_along_rows(dy[rows].float()), *_along_rows(x))
        return dx.to(torch.bfloat16), dw, None


def _groups(counts: torch.Tensor) -> list[tuple[slice, int]]:
    ends = counts.cumsum(0).tolist()
    return [
        (slice(end - n, end), i) for i, (end, n) in enumerate(zip(ends, counts.tolist(), strict=True)) if n
    ]


def _blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quant.quantize(w.detach(), tile=(TILE, TILE))


def _along_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of x [T, C] in tiles of 128 x 1, transposed: [C, T] and [C, T / 128]."""
    codes, scales = quant.quantize(x, tile=(TILE, 1))
    return codes.T, scales.T


class _Fp8Dispatch(torch.autograd.Function):
    """The result of a dispatch in FP8 that has arrived. The gradient is sent in BF16 and ignores the rounding."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, buffer: Any, out: Any) -> Any:
        ctx.buffer, ctx.handle = buffer, out.handle
        return quant.dequantize(out.x, out.scales, dtype=tokens.dtype), out.topk_weights.clone()

    @staticmethod
    def backward(ctx: Any, rows: torch.Tensor, row_weights: torch.Tensor) -> Any:
        handle = ctx.handle
        tokens, weights = torch.ops.moecomm.combine_slots(
            rows.contiguous(),
            row_weights.contiguous(),
            handle.tensor(),
            ctx.buffer.name,
            handle.layout,
            handle.num_tokens,
        )
        return tokens, weights, None, None


class _Arrived(NamedTuple):
    """The fields of a dispatch that experts and combine need."""

    x: torch.Tensor
    rows_per_expert: torch.Tensor
    topk_weights: torch.Tensor
    handle: Any


class _Sent:
    """A dispatch in FP8 under way, with the interface of Pending. Its result belongs to the graph of its inputs."""

    def __init__(self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, buffer: Any) -> None:
        self.tokens, self.weights, self.buffer = tokens, weights, buffer
        with torch.no_grad():
            self.pending = buffer.dispatch(tokens.detach(), ids, weights.detach(), quant="fp8", async_op=True)

    def wait(self) -> _Arrived:
        out = self.pending.wait()
        x, weights = _Fp8Dispatch.apply(self.tokens, self.weights, self.buffer, out)
        return _Arrived(x, out.rows_per_expert, weights, out.handle)


class LowExperts(Experts):
    """Experts with FP32 weights that compute in BF16 or FP8."""

    fp8 = False

    def forward(
        self, x: torch.Tensor, rows_per_expert: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Experts, with BF16 rows."""
        if self.fp8:
            gate, up = Fp8Linear.apply(x, self.gate_up, rows_per_expert).chunk(2, -1)
            return Fp8Linear.apply(F.silu(gate) * up, self.down, rows_per_expert)
        ends = rows_per_expert.cumsum(0)
        gate, up = grouped_mm(x, self.gate_up.to(x.dtype).transpose(1, 2), ends).chunk(2, -1)
        return grouped_mm(F.silu(gate) * up, self.down.to(x.dtype).transpose(1, 2), ends)


class LowMoE(MoE):
    """moecomm.nn.MoE with tokens sent in BF16 or FP8 and experts that compute in it. Everything else is FP32.

    Parameters
    ----------
    config : Config
    buffer : moecomm.Buffer
        A Buffer of dtype bfloat16.
    fp8 : bool
        FP8, else BF16.
    """

    def __init__(self, config: Config, buffer: moecomm.Buffer, fp8: bool) -> None:
        c = config
        super().__init__(
            c.hidden,
            c.expert_intermediate,
            c.num_experts,
            c.top_k,
            c.shared_experts,
            buffer,
            gate=make_gate(c),
        )
        self.experts: LowExperts = LowExperts(
            c.hidden, c.expert_intermediate, self.experts.count, self.experts.first, dtype=torch.float32
        )
        self.experts.fp8 = self.fp8 = fp8
        if self.shared_experts is not None:
            self.shared_experts.float()

    def start_dispatch(self, tokens: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Any:
        """As MoE."""
        tokens = tokens.to(torch.bfloat16)
        if not self.fp8:
            return super().start_dispatch(tokens, topk_ids, topk_weights)
        return _Sent(tokens, topk_ids, topk_weights, self.buffer)

    def forward(self, x: torch.Tensor, with_routing: bool = False) -> Any:
        """As MoE, with FP32 input and output."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        out = self.start_dispatch(tokens, *routing[:2]).wait()
        rows = self.experts(out.x, out.rows_per_expert)
        y = self.buffer.combine(rows, out.handle, topk_weights=out.topk_weights).to(x.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        y = y.view(x.shape)
        return (y, routing) if with_routing else y
