"""A tiny DeepseekV3 in one process or over ranks, for test_transformers.py. Needs transformers.

`python transformers_worker.py single FOLDER` makes the model, its logits and gradients, and compares routers.

`torchrun ... transformers_worker.py shared|split FOLDER` runs the same model over ranks and prints the largest
differences.

`transformers_worker.py trainer FOLDER` runs the same model in Hugging Face's Trainer, over ranks under torchrun, and
prints its losses.
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
    """Make the model, its logits and gradients; compare moecomm's gate with a router of the same weights."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).float()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "experts.gate_up_proj", "experts.down_proj")):
                parameter.normal_(std=0.2)
            if name.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.1)
                parameter[2:4] = -10.0  # no token picks these: rank 1 of 4 gets no rows
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
    """Run the model over ranks; print the largest difference of logits and gradients from the single process."""
    import moecomm.integrations.transformers as integration

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    integration.register(max_tokens=64)
    sizes = dict(tp_size=size) if arrangement == "shared" else dict(fsdp_size=size)
    config = DistributedConfig(**sizes, ep_size=size, ep_implementation="moecomm")
    # Without rows, the eager experts have no autograd graph. The other experts are torch's grouped matmul.
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
    # Caches of DTensor keep torch's groups and gloo's threads. A tensor held by them would abort the
    # shutdown of the interpreter.
    sys.stdout.flush()
    os._exit(0)


class Sentences(torch.utils.data.Dataset):
    """Token ids, generated in every process, equal in all."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(64, (10,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(folder):
    """Run a few steps of Trainer, which splits the batches over ranks; print the losses."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import moecomm.integrations.transformers as integration

    size = int(os.environ.get("WORLD_SIZE", "1"))
    options = {}
    if size > 1:
        dist.init_process_group("gloo")
        options["distributed_config"] = DistributedConfig(
            fsdp_size=size, ep_size=size, ep_implementation="moecomm"
        )
    model = DeepseekV3ForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)
    losses = []

    class Keep(TrainerCallback):
        """Keep the losses that Trainer logs."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            """Keep the loss of one step."""
            if "loss" in logs:
                losses.append(logs["loss"])

    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer{size}",
        use_cpu=True,
        max_steps=5,
        per_device_train_batch_size=4 // size,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[Keep()]).train()
    if os.environ.get("RANK", "0") == "0":
        print("losses", *losses)
    integration.close()
    sys.stdout.flush()
    os._exit(0)  # as in distributed()


if __name__ == "__main__":
    if sys.argv[1] == "single":
        single(sys.argv[2])
    elif sys.argv[1] == "trainer":
        trainer(sys.argv[2])
    else:
        distributed(*sys.argv[1:3])
