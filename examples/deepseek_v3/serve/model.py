"""The served model, and its reference results in one process."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moecomm import InvalidArgument

from ..config import Config, Yarn
from ..model import Model


def load_model(config):
    """Load the whole model in this process: from the checkpoint, or with random parameters of the seed.

    Parameters
    ----------
    config : ServeConfig

    Returns
    -------
    Model
    """
    model = Model(config.model).initialize(config.seed)
    if config.checkpoint and Path(config.checkpoint).is_dir():
        load(config.checkpoint, model)
    elif config.checkpoint:
        model.load_state_dict(torch.load(config.checkpoint, weights_only=True))
    return model.to(config.torch_dtype).requires_grad_(False).eval()


def load(folder, model):
    """Load a checkpoint of train.py into a model. Needs the package `safetensors`."""
    from .. import checkpoint

    checkpoint.load(folder, model)


def trained(folder):
    """Find (Config, checkpoint, tokenizer) in the folder of `make v3-train`.

    Raises
    ------
    InvalidArgument
        The folder contains no finished training.
    """
    folder = Path(folder)
    checkpoints = [
        folder / name for name in ("checkpoint-long", "checkpoint") if (folder / name / "index.json").exists()
    ]
    if not checkpoints or not (folder / "results.json").exists():
        raise InvalidArgument(
            f"trained: {folder} has no results.json with a checkpoint; expected a folder written by `make v3-train`",
            op="serve",
        )
    values = json.loads((folder / "results.json").read_text())["config"]
    yarn = values["yarn"] and Yarn(**values["yarn"])
    return Config(**{**values, "yarn": yarn}), str(checkpoints[0]), str(folder / "tokenizer.json")


def expert_layers(model):
    """All Mixture-of-Experts layers; that of the MTP module is the last."""
    blocks = [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]
    return [block.mlp for block in blocks if block.has_experts]


def all_experts(model, *, shared):
    """(gate_up, down) of all experts of each layer. shared: the shared expert follows them."""
    layers = []
    for moe in expert_layers(model):
        gate_up, down = moe.experts.gate_up.detach(), moe.experts.down.detach()
        if shared:
            s = moe.shared_experts
            fused = torch.cat((s.gate_proj.weight, s.up_proj.weight))
            gate_up, down = torch.cat((gate_up, fused[None])), torch.cat((down, s.down_proj.weight[None]))
        layers.append((gate_up, down))
    return layers


@torch.inference_mode()
def generate(model, prompt, max_tokens, stop=()):
    """Greedy generation, token by token, without cache, drafts or batches. The server must return the same tokens."""
    ids = list(prompt)
    for _ in range(max_tokens):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token in stop:
            break
    return ids[len(prompt) :]


@torch.inference_mode()
def mismatches(model, prompt, tokens):
    """Compare tokens with the choice of one process, in one pass over prompt and tokens.

    Each token must be the argmax after all tokens before it. This holds for all tokens if and only if they equal the
    result of `generate`.

    Returns
    -------
    (int, float)
        Number of mismatched tokens, and smallest distance between the highest and the second highest logit.
    """
    logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    wrong = int((logits.argmax(-1) != torch.tensor(tokens)).sum())
    return wrong, float((best[:, 0] - best[:, 1]).min())
