"""Conversion of weights from transformers' DeepseekV3 and from the published checkpoint."""

from __future__ import annotations

import torch

from .config import Config


def from_transformers(state: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Convert a state_dict with transformers' or the published names to a state_dict of Model.

    Experts may be fused (`experts.gate_up_proj` [E, 2 * intermediate, hidden]) or separate. The MTP module is the
    published layer after the last one, if it exists. Its copies of embedding and head are dropped, because Model
    shares them.
    """
    out: dict[str, torch.Tensor] = {}
    mtp_layer = f"layers.{config.layers}."
    for key, value in state.items():
        name = key.removeprefix("model.").replace("e_score_correction_bias", "bias")
        if name.startswith(mtp_layer):
            name = name.removeprefix(mtp_layer)
            if name.startswith(("embed_tokens", "shared_head.head")):
                continue
            name = name.replace("shared_head.norm", "norm")
            name = (
                f"mtp.{name}"
                if name.startswith(("enorm", "hnorm", "eh_proj", "norm"))
                else f"mtp.block.{name}"
            )
        if name.endswith("experts.gate_up_proj"):
            for i, fused in enumerate(value):
                gate, up = fused.chunk(2)
                prefix = name.removesuffix("gate_up_proj")
                out[f"{prefix}{i}.gate_proj.weight"], out[f"{prefix}{i}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for i, down in enumerate(value):
                out[f"{name.removesuffix('down_proj')}{i}.down_proj.weight"] = down
        else:
            out[name] = value
    return out
