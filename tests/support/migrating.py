"""A model of three layers whose experts have replicas, for tests of migration."""

import torch

import moecomm
from moecomm.balance import rebalance

EXPERTS, TOP_K, HIDDEN, LAYERS, TOKENS = 8, 3, 16, 3, 12


def model(seed=0):
    """Return (weights [L, E, H], xs by rank, ids by (rank, layer)). Whole numbers make sums exact in any order."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randint(-4, 5, (LAYERS, EXPERTS, HIDDEN), generator=g).float()
    xs = torch.randint(-3, 4, (4, TOKENS, HIDDEN), generator=g).float()
    ids = torch.rand((4, LAYERS, TOKENS, EXPERTS), generator=g).argsort(-1)[..., :TOP_K]
    return weights, xs, ids


def placements():
    """Return two placements for different loads. They differ in every layer."""
    old = rebalance(
        torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(1)) + 0.1,
        num_replicas=12,
        num_ranks=4,
    )
    new = rebalance(
        torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2)) + 0.1,
        num_replicas=12,
        num_ranks=4,
        previous=old,
    )
    assert set(new.moves[:, 0].tolist()) == set(range(LAYERS))
    return old, new


def local_weights(weights, placement, rank):
    """Return the weights in a rank's slots of every layer: a dict of two tensors with different dtypes."""
    n = placement.slots_per_rank
    slots = placement.physical_to_logical[:, rank * n : (rank + 1) * n]
    return [dict(w=weights[i, s].clone(), half=weights[i, s, :5].bfloat16()) for i, s in enumerate(slots)]


def forward(buf, local, x, ids):
    """Run all layers: each row times its expert's weights, summed."""
    ys = []
    for layer in range(LAYERS):
        out = buf.dispatch(x, ids[layer].contiguous(), layer=layer)
        scale = torch.repeat_interleave(local[layer]["w"], out.tokens_per_expert, 0)
        ys.append(buf.combine(out.x * scale, out.handle))
    return torch.stack(ys) + 0.0  # no negative zeros: the sign of a zero depends on the choice of replicas


def dense(weights, x, ids):
    """Run all layers without moecomm."""
    return torch.stack([(x[:, None] * weights[layer][ids[layer]]).sum(1) for layer in range(LAYERS)]) + 0.0


def make_buffer(comm, placement, **options):
    """Make a buffer for the model."""
    return moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_tokens=TOKENS,
        dtype=torch.float32,
        placement=placement,
        **options,
    )
