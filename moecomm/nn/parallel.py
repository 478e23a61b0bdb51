"""Experts beside torch's parallelism: DDP and FSDP for everything else, and one norm of all gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .experts import local_part, parts_of
from .layer import MoE


def exclude_experts(model: nn.Module, *, average: bool = True) -> set[nn.Parameter]:
    """Leave the experts of a model alone where DDP or fully_shard takes all other parameters.

    DistributedDataParallel(model) finds them excluded; for FSDP2, pass the result:
    `fully_shard(model, ignored_params=exclude_experts(model))`. Call it on the module that DDP wraps.

    Parameters
    ----------
    model : Module
        With any number of MoE layers.
    average : bool
        Divide the experts' gradients by the number of ranks that they come from, as DDP and FSDP do with all others.
        An expert's gradient is a sum over the tokens of all ranks.

    Returns
    -------
    set of Parameter
        Of the experts that other ranks have others of; empty where one rank has all.
    """
    names, found = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ())), set()
    for prefix, experts in parts_of(model):
        experts.divisor = experts.num_experts // experts.count if average else 1
        for name, parameter in experts.named_parameters(recurse=False):
            names.append(prefix + name)
            found.add(parameter)
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return found


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients of a model down to a norm, in which every expert counts once. Collective.

    Parameters without a DTensor count as equal on all ranks, unless they are experts. torch's function of this name
    takes the experts of each rank for all of them where they are plain, so ranks scale differently; it cannot mix
    DTensors with plain tensors, nor DTensors of different meshes.

    Parameters
    ----------
    model : Module
        Its gradients are scaled in place, by the same factor on all ranks.
    max_norm : float
    norm_type : float
        2: Euclidean; inf: the largest element.

    Returns
    -------
    Tensor []
        The norm before, float32, equal on all ranks.

    Raises
    ------
    InvalidArgument
        norm_type is not positive; a gradient is a sum that is still to be made (Partial).
    """
    if not norm_type > 0:
        raise InvalidArgument(
            f"clip_grad_norm_: norm_type is {norm_type}; expected a number above 0", op="clip_grad_norm_"
        )
    comms = {id(layer.experts): layer.buffer.comm for layer in model.modules() if isinstance(layer, MoE)}
    plain = {
        id(p): comms.get(id(experts))
        for _, experts in parts_of(model)
        if experts.ranks is None
        for p in experts.parameters()
    }
    # Every rank has the same groups in the same order, whether or not it has gradients in them.
    groups: dict[Any, list[torch.Tensor]] = {}
    grads = []
    for parameter in model.parameters():
        group = groups.setdefault(_sharding(parameter, plain), [])
        if parameter.grad is not None:
            grads.append(local_part(parameter.grad))
            group.append(grads[-1])
    device = grads[0].device if grads else torch.device("cpu")
    norms = [_norm_of(group, held, norm_type, device) for group, held in groups.items()]
    total = _norm_of_norms(norms, norm_type, device)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    result: torch.Tensor = total.float()
    return result


def _norm(values: torch.Tensor, norm_type: float) -> torch.Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(values, norm_type, dtype=wide)
    return norm.double()


def _norm_of_norms(norms: list[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return _norm(torch.stack([zero, *norms]), norm_type)


def _sharding(parameter: torch.Tensor, plain: dict[int, Any]) -> Any:
    """Who has the other parts: None, a Communicator, or (mesh, its dimensions over which the parts differ)."""
    tensor = parameter if parameter.grad is None else parameter.grad
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return plain.get(id(parameter))
    if any(p.is_partial() for p in placements):
        raise InvalidArgument(
            f"clip_grad_norm_: a gradient is a DTensor with {placements}; expected shards or copies, such as "
            "after redistribute()",
            op="clip_grad_norm_",
        )
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return mesh, tuple(i for i, p in enumerate(placements) if not p.is_replicate())


def _norm_of(group: Any, grads: list[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """The norm of all parts of these gradients."""
    norm = _norm_of_norms(
        [_norm(grad, norm_type).to(device) for grad in grads if grad.numel()], norm_type, device
    )
    if group is None:
        return norm
    largest = norm_type == float("inf")
    norm = norm if largest else norm**norm_type
    if not isinstance(group, tuple):
        everyone = group.exchange(float(norm))
        norm = norm.new_tensor(max(everyone) if largest else sum(everyone))
    else:
        from torch import distributed

        mesh, dimensions = group
        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        for dimension in dimensions:
            distributed.all_reduce(norm, operation, group=mesh.get_group(dimension))
    return norm if largest else norm ** (1 / norm_type)
