"""Experts: those of one rank, as plain parameters or as this rank's part of DTensors over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import InvalidArgument
from ..tensors import class_of
from .grouped import grouped_mm, grouped_mm_into

_NAMES = ("gate_up", "down")
_WITH_MESH = "MoE(..., mesh=) or Communicator(mesh) with the DeviceMesh of the experts' ranks"


class _Divided(torch.autograd.Function):
    """A weight whose gradient is divided."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.divisor, None


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    if not isinstance(tensor, class_of("torch.distributed.tensor", "DTensor")):
        return tensor
    part: torch.Tensor = tensor.to_local()
    return part


class Experts(nn.Module):
    """SwiGLU experts first .. first + count - 1 of a layer, computed by grouped matrix products.

    With plain parameters, a state_dict has separate keys for each expert, with its global id: `12.gate_proj.weight`,
    `12.up_proj.weight`, `12.down_proj.weight`. The state dicts of all ranks together form one checkpoint. With a mesh,
    parameters and state are DTensors of all experts. Both load either form, saved by any number of ranks: each rank
    loads its own experts and ignores the others.

    Parameters
    ----------
    hidden, intermediate : int
        Elements of a token, and inside an expert.
    count, first : int
        Number of experts of this rank, and the global id of the first.
    dtype : torch.dtype, optional
    num_experts : int, optional
        Of the whole layer. Default: first + count.
    mesh : DeviceMesh, optional
        The ranks of the layer's experts, in order. `gate_up` [num_experts, 2 * intermediate, hidden] and `down`
        [num_experts, hidden, intermediate] are DTensors then, Shard(0) over it.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        count: int,
        first: int = 0,
        *,
        dtype: torch.dtype | None = None,
        num_experts: int | None = None,
        mesh: Any = None,
    ) -> None:
        super().__init__()
        self.intermediate, self.count, self.first = intermediate, count, first
        self.num_experts = first + count if num_experts is None else num_experts
        self.divisor = 1  # of the parameters' gradients: exclude_experts
        # By their global numbers: the ranks that hold the other parts of the DTensors.
        self.ranks = None if mesh is None else tuple(mesh.mesh.flatten().tolist())
        made: Any = dict(dtype=dtype or torch.get_default_dtype(), device=torch.get_default_device())
        gate_up = torch.empty(count, 2 * intermediate, hidden, **made)
        down = torch.empty(count, hidden, intermediate, **made)
        nn.init.normal_(gate_up, std=hidden**-0.5)
        nn.init.normal_(down, std=intermediate**-0.5)
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Shard

            gate_up, down = (
                DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in (gate_up, down)
            )
        self.gate_up, self.down = nn.Parameter(gate_up), nn.Parameter(down)

    @property
    def is_part(self) -> bool:
        """Whether other ranks hold other experts of the layer."""
        return self.count < self.num_experts

    @property
    def span(self) -> str:
        """The first and the last expert, for messages."""
        return f"{self.first}..{self.first + self.count - 1}"

    def forward(
        self, x: torch.Tensor, rows_per_expert: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply each expert to its rows.

        Parameters
        ----------
        x : Tensor [N, hidden]
            Rows grouped by expert. Rows after those of the last expert must be zero.
        rows_per_expert : Tensor [count] int64
        out : Tensor [N, hidden], optional
            Receives the result. Only without gradients.

        Returns
        -------
        Tensor [N, hidden]
        """
        ends = rows_per_expert.cumsum(0)
        gate_up, down = self._weight(self.gate_up), self._weight(self.down).transpose(1, 2)
        gate, up = grouped_mm(x, gate_up.transpose(1, 2), ends).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        return grouped_mm(inner, down, ends) if out is None else grouped_mm_into(out, inner, down, ends)

    def _weight(self, parameter: torch.Tensor) -> torch.Tensor:
        weight = local_part(parameter)
        if self.divisor == 1 or not torch.is_grad_enabled():
            return weight
        divided: torch.Tensor = _Divided.apply(weight, self.divisor)  # type: ignore[no-untyped-call]
        return divided

    # -- state_dict -------------------------------------------------------------------------------

    def _own(self, prefix: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        for i in range(self.count):
            name = f"{prefix}{self.first + i}."
            yield f"{name}gate_proj.weight", "gate_up", (i, slice(0, self.intermediate))
            yield f"{name}up_proj.weight", "gate_up", (i, slice(self.intermediate, None))
            yield f"{name}down_proj.weight", "down", (i,)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: Any) -> None:
        whole = [(prefix + name, name, ...) for name in _NAMES]
        for key, name, at in self._own(prefix) if self.ranks is None else whole:
            parameter = getattr(self, name)
            value = parameter if keep_vars else parameter.detach()
            destination[key] = value if at is ... else value[at]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        fused = [name for name in _NAMES if prefix + name in state_dict]
        for name in fused:
            self._load(prefix + name, name, state_dict[prefix + name], assign, error_msgs)
        keys = [own for own in self._own(prefix) if own[1] not in fused]
        if self.ranks is not None and not any(key in state_dict for key, _, _ in keys):
            missing_keys.extend(prefix + name for name in _NAMES if name not in fused)
            return
        for key, name, at in keys:
            if key not in state_dict:
                missing_keys.append(key)
            else:
                self._copy(key, name, state_dict[key], at, error_msgs)

    def _load(self, key: str, name: str, value: torch.Tensor, assign: bool, error_msgs: list[str]) -> None:
        """A parameter of all experts: a DTensor of its sharding, or a plain tensor of all of them."""
        parameter, placements = getattr(self, name), getattr(value, "placements", None)
        if placements is None:
            whole = (self.num_experts, *parameter.shape[1:])
            if value.shape != whole:
                error_msgs.append(f"size mismatch for {key}: {list(value.shape)}, expected {list(whole)}")
                return
            self._copy(key, name, value[self.first : self.first + self.count], (), error_msgs)
        elif placements != getattr(parameter, "placements", None) or value.shape != parameter.shape:
            error_msgs.append(
                f"{key} is a DTensor {list(value.shape)} with {placements}; expected {list(parameter.shape)} "
                f"with {getattr(parameter, 'placements', 'no placements: a plain tensor')}"
            )
        elif assign:
            setattr(self, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        else:
            with torch.no_grad():
                parameter.copy_(value)

    def _copy(self, key: str, name: str, value: torch.Tensor, at: Any, error_msgs: list[str]) -> None:
        with torch.no_grad():
            held = local_part(getattr(self, name))
            if held.shape[0] != self.count:
                error_msgs.append(
                    f"{key}: fully_shard has divided this rank's experts; expected a DTensor of {name}, or "
                    "loading before fully_shard"
                )
            elif held.is_meta:
                error_msgs.append(f"{key}: {name} is on the meta device; expected to_empty() before loading")
            elif value.shape != held[at].shape:
                error_msgs.append(
                    f"size mismatch for {key}: {list(value.shape)}, expected {list(held[at].shape)}"
                )
            else:
                held[at].copy_(local_part(value))

    def _fqn_modifiers(self) -> dict[str, str]:
        """Asked by torch.distributed.checkpoint.state_dict, which looks for the modules that keys speak of."""
        if self.ranks is None and self.is_part:
            raise InvalidArgument(
                "Experts: torch.distributed.checkpoint takes plain parameters for copies on all ranks, and these "
                f"are experts {self.span} of {self.num_experts}; expected {_WITH_MESH}",
                op="Experts",
            )
        if self.ranks is not None:
            return {}
        return {str(self.first + i): "_numbered" for i in range(self.count)}

    @property
    def _numbered(self) -> Any:
        projections = {f"{p}_proj": SimpleNamespace(weight=None) for p in ("gate", "up", "down")}
        experts = {str(self.first + i): SimpleNamespace(**projections) for i in range(self.count)}
        return SimpleNamespace(**experts)

    # -- torch's wrappers -------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard replaces parameters by assignment, where a module defines it.
        if name in _NAMES and self.ranks is None and self.is_part and hasattr(value, "placements"):
            raise InvalidArgument(
                f"Experts: {name} would become a DTensor {list(value.shape)} with {value.placements}, in which "
                f"the experts {self.span} of this rank are mixed with those of others; expected "
                "fully_shard(..., ignored_params=moecomm.nn.exclude_experts(model)), or DTensors from the start: "
                f"{_WITH_MESH}",
                op="Experts",
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Text of print(experts)."""
        return f"{self.gate_up.shape[2]}, intermediate={self.intermediate}, experts {self.span}"


def parts_of(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The Experts of a model that other ranks have other parts of, with the prefix of their parameters' names."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.is_part:
            yield f"{name}." if name else "", module


def _refuse_wrapping(parent: nn.Module, _: str, child: nn.Module | None) -> None:
    """Called by torch whenever a module becomes part of another one: refuse those that would overwrite experts."""
    sharding = class_of("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    wrapper: Any = parent
    if child is None or not isinstance(wrapper, (nn.parallel.DistributedDataParallel, sharding)):
        return
    from torch import distributed

    group = distributed.get_process_group_ranks(wrapper.process_group)
    for prefix, experts in parts_of(child):
        # Copies of the same experts may be kept equal, where DTensors say which ranks have others.
        others = len(group) if experts.ranks is None else len({*experts.ranks} & {*group})
        if others == 1:
            continue
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            excluded = all(prefix + name in wrapper.parameters_to_ignore for name in _NAMES)
            done, instead = "overwritten with those of rank 0", "before DistributedDataParallel(model)"
        else:  # it has made its flat parameters already
            ignored = vars(wrapper)["_ignored_params"]  # torch has no public name for them
            excluded = all(getattr(experts, name, None) in ignored for name in _NAMES)
            done, instead = "mixed with those of other ranks", "as ignored_states of FullyShardedDataParallel"
        if not excluded:
            raise InvalidArgument(
                f"{type(wrapper).__name__}: {prefix}gate_up and {prefix}down are experts {experts.span} of "
                f"{experts.num_experts}, and would be {done}; expected moecomm.nn.exclude_experts(model) {instead}",
                op="Experts",
            )


register_module_module_registration_hook(_refuse_wrapping)
