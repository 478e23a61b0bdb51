"""Clients of deep_ep on moecomm's drop-in. test_clients.py runs this with the Python that has them installed.

`python clients_worker.py FOLDER` imports everything once, forks the ranks, and prints one line per run: CLIENT RANKS
largest-difference.
"""

import sys

import torch
import torch.distributed as dist
from forked_ranks import over_ranks

from moecomm.integrations import deep_ep

EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 3, 32, 21


class Problem:
    """Matrices as experts, tokens of all ranks, and the results of a single process."""

    def __init__(self, size, dtype):
        g = torch.Generator().manual_seed(0)
        tokens = [TOKENS - 4 * r for r in range(size)]  # different on each rank
        self.w = torch.randn((EXPERTS, HIDDEN, HIDDEN), generator=g, dtype=torch.float64) * 0.2
        self.x = [torch.randn((t, HIDDEN), generator=g, dtype=torch.float64).to(dtype) for t in tokens]
        self.ids = [torch.rand((t, EXPERTS), generator=g).argsort(1)[:, :TOP_K].contiguous() for t in tokens]
        self.p = [torch.rand((t, TOP_K), generator=g) for t in tokens]
        self.to = [
            torch.randn((t, HIDDEN), generator=g, dtype=torch.float64) for t in tokens
        ]  # the loss is sum(y * to)
        w, x, p = (
            self.w.clone().requires_grad_(),
            [t.double().clone().requires_grad_() for t in self.x],
            [t.double().clone().requires_grad_() for t in self.p],
        )
        self.y = [torch.einsum("tk,tkho,th->to", p[r], w[self.ids[r]], x[r]) for r in range(size)]
        sum((y * to).sum() for y, to in zip(self.y, self.to, strict=True)).backward()
        self.y, self.gw, self.gx, self.gp = (
            [y.detach() for y in self.y],
            w.grad,
            [t.grad for t in x],
            [t.grad for t in p],
        )

    def mine(self, rank, size):
        """Return a rank's leaf tensors: tokens, probabilities, its experts."""
        local = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
        return (
            self.x[rank].clone().requires_grad_(),
            self.p[rank].clone().requires_grad_(),
            self.w[local].to(self.x[rank].dtype).clone().requires_grad_(),
        ), local

    def compare(self, rank, local, y, leaves):
        """Return the largest difference of the result and of all gradients."""
        x, p, w = leaves
        pairs = [
            (y, self.y[rank]),
            (x.grad, self.gx[rank]),
            (p.grad, self.gp[rank]),
            (w.grad, self.gw[local]),
        ]
        return max(float((got.double() - want).abs().max()) for got, want in pairs)


def megatron_deepep(rank, size):
    """Run Megatron's fused_a2a on Buffer, forward and backward, twice: the second time with events."""
    from megatron.core.transformer.moe import fused_a2a

    problem, worst = Problem(size, torch.float64), 0.0
    for by_events in (False, True):
        (x, p, w), local = problem.mine(rank, size)
        recv, ids, probs, counts, handle = fused_a2a.fused_dispatch(
            x, problem.ids[rank], p, EXPERTS, dist.group.WORLD, by_events, by_events
        )
        assert counts.tolist() == [int((ids == e).sum()) for e in range(len(w))]
        here = ids >= 0
        gates = torch.where(here, probs, 0.0).double()  # only picks of this rank have a gradient
        rows = torch.einsum("nk,nkho,nh->no", gates, w[ids.clamp(min=0)], recv)
        y, _ = fused_a2a.fused_combine(rows, dist.group.WORLD, handle, by_events, by_events)
        (y * problem.to[rank]).sum().backward()
        worst = max(worst, problem.compare(rank, local, y, (x, p, w)))
    return worst


def megatron_hybridep(rank, size):
    """Run Megatron's fused_a2a on HybridEPBuffer, with and without a row budget, then with more tokens."""
    from megatron.core.transformer.moe import fused_a2a

    problem, worst = Problem(size, torch.float64), 0.0
    fused_a2a.init_hybrid_ep_buffer(dist.group.WORLD, HIDDEN, 4, EXPERTS // size, 4, 4, False)
    for budget in (None, TOKENS * size * TOP_K + 1):
        (x, p, w), local = problem.mine(rank, size)
        chosen, _ = deep_ep.hybrid_ep_buffer.indices_to_map(problem.ids[rank], None, len(x), EXPERTS)
        dense = torch.zeros((len(x), EXPERTS)).scatter(1, problem.ids[rank], p)
        recv, probs, _, counts, handle = fused_a2a.hybrid_ep_dispatch(
            x, chosen, dense, dist.group.WORLD, EXPERTS // size, 4, 4, budget
        )
        parts = [
            part @ m
            for part, m in zip(
                recv.split([*counts.tolist(), len(recv) - int(counts.sum())]), [*w, w[0] * 0], strict=True
            )
        ]
        y = fused_a2a.hybrid_ep_combine(torch.cat(parts) * probs.double()[:, None], handle, budget, None)
        (y * problem.to[rank]).sum().backward()
        worst = max(worst, problem.compare(rank, local, y, (x, p, w)))
    return worst


def torchtitan_v2(rank, size):
    """Run torchtitan's deepep on ElasticBuffer: the compact layout with gradients, the expanded layout of inference."""
    from torchtitan.distributed.deepep import deepep

    for name in ("dispatch", "combine"):  # torchtitan registers them only for GPUs
        torch.library.impl(deepep._lib, name, "CPU")(getattr(deepep, f"_{name}_op_impl"))
    problem = Problem(size, torch.float32)
    deepep.get_buffer(dist.group.WORLD, hidden=HIDDEN, num_max_tokens_per_rank=TOKENS + 3, num_topk=TOP_K)
    worst = 0.0
    for inference in (False, True):
        (x, p, w), local = problem.mine(rank, size)
        with torch.set_grad_enabled(not inference):
            rows, counts, state = deepep.dispatch_tokens(
                x, problem.ids[rank], p, len(w), EXPERTS, num_tokens_per_rank=TOKENS, cudagraphable=inference
            )
            parts = [
                part @ m
                for part, m in zip(
                    rows.split([*counts.tolist(), len(rows) - int(counts.sum())]), [*w, w[0] * 0], strict=True
                )
            ]
            y = deepep.combine_tokens(torch.cat(parts), state)
            deepep.sync_combine()
        if inference:
            worst = max(worst, float((y.double() - problem.y[rank]).abs().max()))
        else:
            (y * problem.to[rank].float()).sum().backward()
            worst = max(worst, problem.compare(rank, local, y, (x, p, w)))
    return worst


def megatron_layer(rank, size):
    """Run Megatron's MoELayer with its flex dispatcher on both interfaces.

    The output and all gradients are compared with its own allgather dispatcher on gloo.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.cuda.current_device = lambda: "cpu"  # the layer allocates tensors on torch's current GPU
    moe_utils.te_general_gemm = getattr(
        moe_utils, "te_general_gemm", None
    )  # Megatron 0.16.1 defines it only if TransformerEngine is installed
    parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
    results = {}
    for name, how in (
        ("allgather", {}),
        ("deepep", dict(moe_flex_dispatcher_backend="deepep")),
        ("hybridep", dict(moe_flex_dispatcher_backend="hybridep")),
    ):
        torch.manual_seed(7)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOP_K,
            ffn_hidden_size=48,
            moe_token_dispatcher_type="allgather" if name == "allgather" else "flex",
            expert_model_parallel_size=size,
            use_cpu_initialization=True,
            add_bias_linear=False,
            moe_grouped_gemm=False,
            **how,
        )
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False).submodules.mlp
        layer = MoELayer(config, spec.submodules)
        with torch.no_grad():
            for key, parameter in sorted(layer.named_parameters()):
                seed = 11 + sum(key.encode()) + (1000 * rank if "experts" in key else 0)
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
                )
        x = torch.randn((6, 2, HIDDEN), generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = layer(x)[0]
        (y * torch.arange(HIDDEN)).sum().backward()
        results[name] = [
            y.detach(),
            x.grad,
            *(parameter.grad for _, parameter in sorted(layer.named_parameters())),
        ]
    want = results.pop("allgather")
    return max(
        float(((g - w).abs() / (1 + w.abs())).max())
        for got in results.values()
        for g, w in zip(got, want, strict=True)
    )


CLIENTS = {
    "megatron_deepep": megatron_deepep,
    "megatron_hybridep": megatron_hybridep,
    "megatron_layer": megatron_layer,
    "torchtitan_v2": torchtitan_v2,
}


def main(folder):
    """Run all clients on 2 and 4 ranks, from one process that has imported everything."""
    torch.set_num_threads(1)
    deep_ep.configure(timeout=120.0)
    deep_ep.install()
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import torchtitan.distributed.deepep.deepep  # noqa: F401

    for client in CLIENTS:
        for size in (2, 4):
            print(client, size, over_ranks(CLIENTS[client], size, f"{folder}/{client}{size}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
