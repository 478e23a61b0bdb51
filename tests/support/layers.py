"""A layer whose experts multiply by constants, with dispatch and combine, and in plain torch."""

import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

LAYOUTS = ["expert", "rank"]


def plain_layer(xs, ids, weights, scale, bias):
    """Compute the layer of all ranks in plain torch: expert e multiplies by scale[e]; return y by rank."""
    out = []
    for x, i, w in zip(xs, ids, weights, strict=True):
        picked = scale[i.clamp_min(0)] * (i >= 0)[:, :, None]  # [T, K, H]
        out.append((w[:, :, None].to(x.dtype) * x[:, None, :] * picked).sum(1) + bias.to(x.dtype))
    return out


def layer(buf, x, ids, weights, scale, *, bias=None, **how):
    """Compute the same layer with dispatch and combine; `scale` [E, H] has all experts."""
    out = buf.dispatch(x, ids, weights, **how)
    first, per_rank = buf.comm.rank * buf.experts_per_rank, buf.experts_per_rank
    if out.handle.layout == "rank":
        local = out.topk_ids
        factor = (
            scale[(local + first).clamp_min(0)] * (out.topk_weights * (local >= 0))[:, :, None].to(x.dtype)
        ).sum(1)
        return buf.combine(out.x * factor, out.handle, bias=bias)
    of_row = torch.repeat_interleave(torch.arange(per_rank), out.rows_per_expert)
    of_row = torch.cat([of_row, of_row.new_zeros(len(out.x) - len(of_row))])
    return buf.combine(out.x * scale[of_row + first], out.handle, topk_weights=out.topk_weights, bias=bias)


def make_buffer(comm, world, num_experts, **options):
    xs, ids, _ = world
    return moecomm.Buffer(
        comm,
        hidden=xs[0].shape[1],
        num_experts=num_experts,
        top_k=ids[0].shape[1],
        max_tokens=max(len(x) for x in xs) or 1,
        dtype=xs[0].dtype,
        **options,
    )
