"""Compares the model of examples/deepseek_v3 with transformers' DeepseekV3, for test_model.py.

Prints the largest differences of logits and gradients, without and with YaRN, and of cached decoding.
"""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from examples.deepseek_v3.cache import Cache
from examples.deepseek_v3.config import Config, Yarn
from examples.deepseek_v3.convert import from_transformers
from examples.deepseek_v3.model import Model

SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_shared_experts=2,
    n_routed_experts=16,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_rope_head_dim=8,
    v_head_dim=10,
    qk_nope_head_dim=12,
    first_k_dense_replace=1,
    max_position_embeddings=640,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    attn_implementation="eager",
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=40.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=16,
)


def same(theirs):
    """Return the Config of a DeepseekV3Config."""
    yarn = Yarn(original=16) if theirs.rope_parameters["rope_type"] == "yarn" else None
    return Config(
        vocab_size=theirs.vocab_size,
        hidden=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        dense_layers=theirs.first_k_dense_replace,
        heads=theirs.num_attention_heads,
        q_rank=theirs.q_lora_rank,
        kv_rank=theirs.kv_lora_rank,
        nope=theirs.qk_nope_head_dim,
        rope=theirs.qk_rope_head_dim,
        value=theirs.v_head_dim,
        intermediate=theirs.intermediate_size,
        expert_intermediate=theirs.moe_intermediate_size,
        num_experts=theirs.n_routed_experts,
        top_k=theirs.num_experts_per_tok,
        shared_experts=theirs.n_shared_experts,
        num_groups=theirs.n_group,
        top_groups=theirs.topk_group,
        scale=theirs.routed_scaling_factor,
        norm_eps=theirs.rms_norm_eps,
        yarn=yarn,
        mtp=False,
    )


def compare(**more):
    """Return the largest differences of logits, gradients and decoding, and the largest gradient."""
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **more)).float()
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                tensor.normal_(std=0.15)
    config = same(theirs.config)
    ours = Model(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config))
    ids = torch.randint(96, (3, 40))
    want, got = theirs(ids, labels=ids), ours(ids)
    logits = float((want.logits - got.logits).detach().abs().max())
    want.loss.backward()
    torch.nn.functional.cross_entropy(got.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    worst = largest = 0.0
    for name, parameter in ours.named_parameters():
        if name.endswith(("experts.gate_up", "experts.down")):
            expected = grads[f"model.{name}_proj"]
        else:
            expected = grads[name if name.startswith("lm_head") else f"model.{name}"]
        worst = max(worst, float((parameter.grad - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    with torch.no_grad():
        cache = Cache(config, 3, 64)
        parts = [ours(ids[:, :30], cache=cache)] + [
            ours(ids[:, i : i + 1], cache=cache) for i in range(30, 40)
        ]
        decoded = torch.cat([p.logits for p in parts], 1)
    return logits, worst, float((decoded - want.logits.detach()).abs().max()), largest


if __name__ == "__main__":
    torch.manual_seed(0)
    for found in (compare(), compare(rope_parameters=YARN)):
        print("logits {:.3e} grads {:.3e} decoded {:.3e} of {:.3e}".format(*found))
