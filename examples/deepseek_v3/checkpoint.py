"""Checkpoints that any number of ranks can load: experts are stored under their global ids.

Each rank writes its experts, and rank 0 also the replicated parameters. index.json is written last and marks the
checkpoint as complete. To load, each rank reads its experts from the files that contain them. Needs the package
`safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moecomm
from moecomm.errors import InvalidArgument
from moecomm.nn import Experts

from .model import Model

MOMENTS = ("exp_avg", "exp_avg_sq")


def pieces(model: Model) -> Iterator[tuple[str, torch.Tensor, tuple[Any, ...], bool]]:
    """Yield (name, parameter, index, belongs to an expert) of all stored tensors. Names are equal on all ranks."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in experts:
            for i in range(experts[owner].count):
                yield f"{owner}.{experts[owner].first + i}.{kind}", parameter, (i,), True
        else:
            yield name, parameter, (), False


def save(
    folder: str | Path,
    comm: moecomm.Communicator,
    model: Model,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint. Collective. An interrupted checkpoint is not loaded later.

    Parameters
    ----------
    folder : path
    comm : moecomm.Communicator
    model : Model
    optimizer : torch.optim.Optimizer
    progress : dict
        Progress of the run, in types that JSON supports.
    """
    folder = Path(folder)
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
    comm.barrier()
    tensors = {}
    for name, parameter, at, is_expert in pieces(model):
        if is_expert or comm.rank == 0:
            tensors[f"weight/{name}"] = parameter.detach()[at].clone()
            state = optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                if moment in state:
                    tensors[f"{moment}/{name}"] = state[moment][at].clone()
    if comm.rank == 0:
        tensors |= {f"buffer/{name}": value.clone() for name, value in model.named_buffers()}
    save_file(tensors, folder / f"rank{comm.rank}.safetensors")
    steps = max((float(s["step"]) for s in optimizer.state.values()), default=0.0)
    comm.barrier()
    if comm.rank == 0:
        index = {"ranks": comm.size, "optimizer_steps": steps, "progress": progress}
        unfinished = folder / "index.json.unfinished"
        unfinished.write_text(json.dumps(index))
        unfinished.rename(folder / "index.json")
    comm.barrier()


def load(folder: str | Path, model: Model, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load a checkpoint into the model and, if given, the optimizer; return the saved progress.

    Raises
    ------
    InvalidArgument
        The folder has no complete checkpoint, or one of another model.
    """
    folder = Path(folder)
    if not (folder / "index.json").exists():
        raise InvalidArgument(f"folder {folder} has no index.json; expected a complete checkpoint", op="load")
    index = json.loads((folder / "index.json").read_text())
    where: dict[str, Any] = {}
    for rank in range(index["ranks"]):
        file = safe_open(folder / f"rank{rank}.safetensors", "pt")
        where |= dict.fromkeys(file.keys(), file)

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in where:
            raise InvalidArgument(
                f"folder {folder} has no {name}; expected a checkpoint of this model", op="load"
            )
        value = where[name].get_tensor(name)
        if value.shape != shape:
            raise InvalidArgument(
                f"folder {folder}: {name} has shape {list(value.shape)}; expected {list(shape)} as in the model",
                op="load",
            )
        return value

    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(read(f"buffer/{name}", buffer.shape))
        for name, parameter, at, _ in pieces(model):
            parameter[at].copy_(read(f"weight/{name}", parameter[at].shape))
            if optimizer is not None and index["optimizer_steps"]:
                state = optimizer.state[parameter]
                state["step"] = torch.tensor(index["optimizer_steps"])
                for moment in MOMENTS:
                    kept = state.setdefault(moment, torch.zeros_like(parameter))
                    kept[at].copy_(read(f"{moment}/{name}", kept[at].shape))
    return index["progress"]
