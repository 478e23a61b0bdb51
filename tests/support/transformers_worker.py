"""A tiny DeepseekV3 in one process or over ranks: run by test_transformers.py with the Python that has transformers.

python transformers_worker.py single FOLDER            makes the model, its logits and gradients, and
                                                       routers to compare with
torchrun ... transformers_worker.py shared|split FOLDER   the same model over ranks: prints the largest differences
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moecomm.gate import Gate, keep_float32

CONFIG = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    v_head_dim=8,
    qk_nope_head_dim=8,
    first_k_dense_replace=1,
    max_position_embeddings=64,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    attn_implementation="eager",
)


def text(batch):
    """Token ids [batch, 10]."""
    return torch.randint(64, (batch, 10), generator=torch.Generator().manual_seed(0))


def single(folder):
    """Model, logits and gradients; and moecomm's gate beside the router of the same weights."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).float()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "experts.gate_up_proj", "experts.down_proj")):
                parameter.normal_(std=0.2)
            if name.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.1)
                parameter[2:4] = -10.0  # nobody picks these: rank 1 of 4 gets no row at all
    model.save_pretrained(folder)
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    out = model(text(6), labels=text(6))
    out.loss.backward()
    torch.save(
        {"logits": out.logits.detach(), "grads": {k: p.grad for k, p in model.named_parameters()}},
        f"{folder}/single.pt",
    )
    worst = 0.0
    for groups, limit, normalize in ((4, 2, True), (1, 1, True), (8, 3, False)):
        shape = DeepseekV3Config(
            **{
                **CONFIG,
                "n_routed_experts": 32,
                "n_group": groups,
                "topk_group": limit,
                "norm_topk_prob": normalize,
            }
        )
        router = DeepseekV3TopkRouter(shape)
        gate = Gate(32, 32, 3, num_groups=groups, top_groups=limit, normalize=normalize, scale=2.5)
        with torch.no_grad():
            router.weight.normal_()
            router.e_score_correction_bias.normal_(std=0.1)
            gate.weight.copy_(router.weight)
            gate.bias.copy_(router.e_score_correction_bias)
            x = torch.randn(200, 32)
            _, weights, ids = router(x)
            ours = gate(x)
        order, own = ids.argsort(1), ours.topk_ids.argsort(1)
        assert torch.equal(ids.gather(1, order), ours.topk_ids.gather(1, own)), "other experts were picked"
        worst = max(worst, float((weights.gather(1, order) - ours.topk_weights.gather(1, own)).abs().max()))
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("e_score_correction_bias")}
    assert keep_float32(model, "e_score_correction_bias") == len(before) == 2
    after = model.bfloat16().state_dict()
    assert all(after[k].dtype == torch.float32 and torch.equal(after[k], v) for k, v in before.items()), (
        "a balancing bias was cast"
    )
    print(f"router {worst:.3e}")


def distributed(arrangement, folder):
    """The largest difference of logits and of gradients from the single process."""
    import moecomm.integrations.transformers as integration

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    integration.register(max_tokens=64)
    sizes = dict(tp_size=size) if arrangement == "shared" else dict(fsdp_size=size)
    config = DistributedConfig(**sizes, ep_size=size, ep_implementation="moecomm")
    # The eager experts leave no trace for autograd where no row comes; the others are torch's grouped matmul.
    experts = "eager" if arrangement == "split" else "grouped_mm"
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, distributed_config=config, experts_implementation=experts
    )
    want = torch.load(f"{folder}/single.pt")
    batch = text(6)
    # Ranks share the batch, or hold different numbers of sequences.
    parts = [batch] * size if arrangement == "shared" else batch.split([4, 2] if size == 2 else [2, 1, 1, 2])
    first = 0 if arrangement == "shared" else sum(len(p) for p in parts[:rank])
    mine = parts[rank]
    out = model(mine, labels=mine)
    logits = float((out.logits.detach() - want["logits"][first : first + len(mine)]).abs().max())
    share = (
        1.0 if arrangement == "shared" else size * len(mine) / len(batch)
    )  # FSDP averages the ranks' gradients
    (out.loss * share).backward()
    grads, scale = 0.0, 0.0
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        expected = want["grads"][name]
        grads, scale = (
            max(grads, float((grad - expected).abs().max())),
            max(scale, float(expected.abs().max())),
        )
    worst = [None] * size
    dist.all_gather_object(worst, (logits, grads, scale))
    if rank == 0:
        print(f"logits {max(w[0] for w in worst):.3e} grads {max(w[1] for w in worst):.3e} of {scale:.3e}")
    integration.close()
    dist.destroy_process_group()
    # Caches of DTensor keep torch's groups, and gloo's threads with them: one that still held a tensor
    # would abort the interpreter's end.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    single(sys.argv[2]) if sys.argv[1] == "single" else distributed(*sys.argv[1:3])
