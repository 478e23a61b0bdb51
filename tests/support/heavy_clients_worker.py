"""vLLM and SGLang on moecomm's drop-in for deep_ep: run by test_heavy_clients.py with the Python that has them.

python heavy_clients_worker.py FOLDER     imports once, then forks the ranks; a line "CLIENT RANKS difference" each

Their dispatchers run unchanged, between the layers of this file: a gate that picks at random and experts that are
matrices. What the packages ask of a GPU beside deep_ep is answered here.
"""

import importlib
import os
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist
from forked_ranks import over_ranks

from moecomm.integrations import deep_ep

EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 3, 2048, 21  # vLLM's low-latency path takes some hidden sizes alone


class Problem:
    """Tokens of every rank, experts that are vectors of factors, and the sum over picks of one process.

    An expert multiplies a token by its factors, powers of two: rows in bfloat16 are exact, and only the sum rounds.
    """

    def __init__(self, size):
        g = torch.Generator().manual_seed(torch.seed() if dist.get_rank() == 0 else 0)
        seed = torch.randint(1 << 62, (1,), generator=g)
        dist.broadcast(seed, 0)
        g.manual_seed(int(seed))
        tokens = [TOKENS - 4 * r for r in range(size)]  # ranks differ
        self.factor = 2.0 ** torch.randint(-2, 3, (EXPERTS, HIDDEN), generator=g)
        self.x = [torch.randn((t, HIDDEN), generator=g).bfloat16() for t in tokens]
        self.ids = [torch.rand((t, EXPERTS), generator=g).argsort(1)[:, :TOP_K].contiguous() for t in tokens]
        self.p = [torch.rand((t, TOP_K), generator=g) for t in tokens]

    def wanted(self, rank):
        """The result for a rank's tokens in float64."""
        gates = torch.zeros((len(self.x[rank]), EXPERTS), dtype=torch.float64)
        gates.scatter_(1, self.ids[rank], self.p[rank].double())
        return (gates @ self.factor.double()) * self.x[rank].double()

    def difference(self, rank, y):
        """The largest one, relative to the largest value of the token."""
        wanted = self.wanted(rank)
        scale = wanted.abs().amax(1, keepdim=True)
        return float(((y.double() - wanted).abs() / scale).max())

    def apply(self, rows, ids, weights):
        """Each row by the experts that it is picked for here (ids outside: none), weighted and summed."""
        gates = torch.zeros((len(rows), EXPERTS + 1))
        gates.scatter_(1, torch.where(ids < 0, EXPERTS, ids), weights.float())
        return ((gates[:, :EXPERTS] @ self.factor) * rows.float()).bfloat16()


def owned(ids, rank, size):
    """Ids of experts of this rank; -1 for others."""
    return torch.where(ids * size // EXPERTS == rank, ids, -1)


def vllm_round(problem, rank, prepare, compute):
    """One layer by vLLM's interface: the largest difference."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

    modular_kernel.PIN_MEMORY = False  # it has decided for a GPU
    x, ids, p = problem.x[rank], problem.ids[rank], problem.p[rank]
    rows, _, meta, row_ids, row_weights = prepare.prepare(
        x, p, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
    )
    out, reduce = compute(rows, meta, row_ids, row_weights)
    y = torch.full_like(x, float("nan"))
    prepare.finalize(y, out, p, ids, False, reduce)
    return problem.difference(rank, y)


def vllm_high_throughput(rank, size):
    """DeepEPHTPrepareAndFinalize over Buffer."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht import DeepEPHTPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    problem = Problem(size)
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 26, 0, low_latency_mode=False, num_qps_per_rank=1)
    prepare = DeepEPHTPrepareAndFinalize(buffer, size, size, rank * EXPERTS // size)

    def compute(rows, meta, ids, weights):
        mine = owned(ids, rank, size)
        here = torch.bincount(mine[mine >= 0], minlength=EXPERTS)[rank * EXPERTS // size :][: EXPERTS // size]
        assert meta.expert_num_tokens.tolist() == here.tolist()
        return problem.apply(rows, mine, weights), TopKWeightAndReduceNoOP()

    return max(vllm_round(problem, rank, prepare, compute) for _ in range(2))


def vllm_low_latency(rank, size):
    """DeepEPLLPrepareAndFinalize over Buffer in low-latency mode."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll import DeepEPLLPrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

    problem, local = Problem(size), EXPERTS // size
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(TOKENS, HIDDEN, size, EXPERTS)
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, hint, low_latency_mode=True, num_qps_per_rank=local)
    prepare = DeepEPLLPrepareAndFinalize(buffer, TOKENS, size)

    def compute(rows, meta, ids, weights):
        assert ids is None and weights is None and rows.shape == (local, size * TOKENS, HIDDEN)
        out = torch.full_like(rows, float("nan"))
        for e, count in enumerate(meta.expert_num_tokens.tolist()):
            out[e, :count] = (rows[e, :count].float() * problem.factor[rank * local + e]).bfloat16()
        return out, TopKWeightAndReduceDelegate()

    return max(vllm_round(problem, rank, prepare, compute) for _ in range(3))


def vllm_v2_prefill(rank, size):
    """DeepEPV2PrepareAndFinalize over ElasticBuffer, in its prefill mode: the decode mode runs a Triton kernel."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2 import DeepEPV2PrepareAndFinalize
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    problem = Problem(size)
    buffer = deep_ep.ElasticBuffer(
        group=dist.group.WORLD,
        num_max_tokens_per_rank=TOKENS,
        hidden=HIDDEN,
        num_topk=TOP_K,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        prefer_overlap_with_compute=True,
        allow_multiple_reduction=True,
        explicitly_destroy=True,
    )
    assert buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=TOP_K) >= 0
    prepare = DeepEPV2PrepareAndFinalize(buffer, size, size, rank * EXPERTS // size, EXPERTS, TOP_K)

    def compute(rows, meta, ids, weights):
        assert ids.shape == weights.shape == (len(rows), 1) and len(rows) == int(meta.expert_num_tokens.sum())
        return problem.apply(rows, ids, weights), TopKWeightAndReduceNoOP()

    worst = max(vllm_round(problem, rank, prepare, compute) for _ in range(2))
    dist.barrier()
    buffer.destroy()
    return worst


def sglang_dispatcher(rank, size, mode, name):
    """SGLang's DeepEPDispatcher for one mode: a function that runs a layer and returns its largest difference."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe import utils
    from sglang.srt.layers.moe.token_dispatcher import deepep
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.layers.moe.utils import DeepEPMode

    os.environ["SGLANG_DEEPEP_BF16_DISPATCH"] = "1"
    utils.get_server_args = lambda: None  # there is no server
    deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True  # the only runner that its normal mode combines for
    deepep.get_is_extend_in_batch = lambda: name == "normal"
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=132)
    problem, local = Problem(size), EXPERTS // size
    dispatcher = deepep.DeepEPDispatcher(
        dist.group.WORLD,
        TOP_K,
        num_experts=EXPERTS,
        num_local_experts=local,
        hidden_size=HIDDEN,
        params_dtype=torch.bfloat16,
        deepep_mode=DeepEPMode(mode),
        async_finish=True,
        return_recv_hook=True,
    )

    def layer():
        x, ids, p = problem.x[rank], problem.ids[rank], problem.p[rank]
        out = dispatcher.dispatch(x, StandardTopKOutput(p, ids, None))
        rows = out.hidden_states
        if name == "normal":
            mine = torch.where(out.topk_ids < 0, -1, out.topk_ids + rank * local)
            done = problem.apply(rows, mine, out.topk_weights)
            done = deepep.DeepEPNormalCombineInput(done, out.topk_ids, out.topk_weights)
        else:
            done = torch.full_like(rows, float("nan"))
            for e, count in enumerate(out.masked_m.tolist()):
                done[e, :count] = (rows[e, :count].float() * problem.factor[rank * local + e]).bfloat16()
            done = deepep.DeepEPLLCombineInput(done, out.topk_ids, out.topk_weights)
        return problem.difference(rank, dispatcher.combine(done))

    return layer


def sglang_normal(rank, size):
    """SGLang's dispatcher in normal mode."""
    layer = sglang_dispatcher(rank, size, "normal", "normal")
    return max(layer() for _ in range(2))


def sglang_low_latency(rank, size):
    """SGLang's dispatcher in low-latency mode."""
    layer = sglang_dispatcher(rank, size, "low_latency", "low_latency")
    return max(layer() for _ in range(3))


CLIENTS = {
    "vllm_high_throughput": vllm_high_throughput,
    "vllm_low_latency": vllm_low_latency,
    "vllm_v2_prefill": vllm_v2_prefill,
    "sglang_normal": sglang_normal,
    "sglang_low_latency": sglang_low_latency,
}


def stand_in(*names):
    """Modules that imports name and dispatchers never use."""
    for name in names:
        sys.modules[name] = mock.MagicMock(__path__=[], __spec__=None)


def main(folder):
    """Every client over 2 and 4 ranks, from one process that has imported everything."""
    torch.set_num_threads(1)
    deep_ep.configure(timeout=120.0)
    deep_ep.install()
    for name in ("ht", "ll", "v2"):
        importlib.import_module(f"vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_{name}")
    stand_in("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    importlib.import_module("sglang.srt.layers.moe.token_dispatcher.deepep")

    for client, run in CLIENTS.items():
        for size in (2, 4):
            print(client, size, over_ranks(run, size, f"{folder}/{client}{size}"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
