"""MoE layer whose experts are distributed over the ranks of a Buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .experts import Experts
from .gate import Gate
from ..tensors import plain

if TYPE_CHECKING:
    from ..buffer import Buffer
    from ..results import Dispatched, Pending


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): all shared experts of a layer as one module.

    Parameters
    ----------
    hidden, intermediate : int
    dtype : torch.dtype, optional
    """

    def __init__(self, hidden: int, intermediate: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        y: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MoE(nn.Module):
    """A Mixture-of-Experts layer: gate, dispatch, this rank's experts, combine, plus shared experts.

    Parameters
    ----------
    hidden, intermediate : int
        Elements of a token, and inside an expert.
    num_experts, top_k : int
        Experts over all ranks, and picks per token, as for Buffer.
    shared_experts : int
        Number of experts that every token visits in addition to its picks.
    buffer : Buffer
        Made for the same hidden, num_experts and top_k. Its dtype is that of tokens and experts. Layers of one shape
        may share it.
    gate : Module, optional
        Called with tokens [T, hidden]; returns topk_ids and topk_weights, and possibly more. Default:
        moecomm.gate.Gate.
    capacity : int, optional
        Static number of rows that this rank's experts compute, as for Buffer.dispatch. torch.compile(fullgraph=True)
        and CUDA graphs need it.
    expert_alignment : int
        As for Buffer.dispatch.
    mesh : DeviceMesh, "communicator" or None
        The experts' parameters are DTensors, Shard(0) over this mesh, whose ranks are the Communicator's.
        "communicator": the mesh that the Communicator was made with, if it was. None: plain parameters.

    Raises
    ------
    InvalidArgument
        buffer is missing or was made for another shape; mesh has other ranks than its Communicator.

    Source: DeepSeek-V3 technical report, section 2.1.2.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        shared_experts: int = 0,
        buffer: Buffer | None = None,
        *,
        gate: nn.Module | None = None,
        capacity: int | None = None,
        expert_alignment: int = 1,
        mesh: Any = "communicator",
    ) -> None:
        super().__init__()
        for name, value in {"hidden": hidden, "num_experts": num_experts, "top_k": top_k}.items():
            if buffer is None or getattr(buffer, name) != value:
                raise InvalidArgument(
                    f"MoE: buffer is {'None' if buffer is None else f'for {name} = {getattr(buffer, name)}'}; "
                    f"expected a Buffer for {name} = {value}",
                    op="MoE",
                )
        assert buffer is not None
        self.buffer, self.capacity, self.expert_alignment = buffer, capacity, expert_alignment
        self.gate = Gate(hidden, num_experts, top_k) if gate is None else gate
        self.experts = Experts(
            hidden,
            intermediate,
            buffer.experts_per_rank,
            buffer.comm.rank * buffer.experts_per_rank,
            dtype=buffer.dtype,
            num_experts=num_experts,
            mesh=_mesh_of(mesh, buffer),
        )
        self.shared_experts = (
            SwiGLU(hidden, shared_experts * intermediate, dtype=buffer.dtype) if shared_experts else None
        )

    def forward(self, x: torch.Tensor, with_routing: bool = False) -> Any:
        """Compute the layer. Collective. Ranks may have different numbers of tokens, including none.

        Parameters
        ----------
        x : Tensor [..., hidden] of the buffer's dtype
            Under torch.autocast it may have any dtype: the layer computes in the buffer's dtype.
        with_routing : bool
            Also return the gate's result, for a balance loss, counts or a bias update.

        Returns
        -------
        Tensor [..., hidden], or (Tensor [..., hidden], result of the gate)
        """
        x = plain("MoE", "x", x, traceable=True)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x.to(self.buffer.dtype), with_routing)
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        y = self._routed(tokens, *routing[:2])
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        y = y.view(x.shape)
        return (y, routing) if with_routing else y

    def start_dispatch(
        self, tokens: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending[Dispatched]:
        """Start this layer's dispatch on the progress thread and return its Pending."""
        pending: Pending[Dispatched] = self._dispatch(tokens, topk_ids, topk_weights, async_op=True)
        return pending

    def _dispatch(
        self, tokens: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, **how: Any
    ) -> Any:
        return self.buffer.dispatch(
            tokens,
            topk_ids,
            topk_weights,
            expert_alignment=self.expert_alignment,
            capacity=self.capacity,
            **how,
        )

    def _routed(
        self, tokens: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        out = self._dispatch(tokens, topk_ids, topk_weights)
        # Without gradients the experts write directly to the memory that combine reads. Else combine copies once.
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        rows = self.experts(out.x, out.rows_per_expert, out.handle.rows if in_place else None)
        return self.buffer.combine(rows, out.handle, topk_weights=out.topk_weights)

    def extra_repr(self) -> str:
        """Text of print(layer)."""
        return f"ranks={self.buffer.comm.size}, capacity={self.capacity}, expert_alignment={self.expert_alignment}"


def _mesh_of(mesh: Any, buffer: Buffer) -> Any:
    """The DeviceMesh of a layer's experts, or None."""
    comm = buffer.comm
    if isinstance(mesh, str) and mesh == "communicator":
        mesh = comm.mesh
    if mesh is None:
        return None
    if not hasattr(mesh, "get_local_rank") or mesh.ndim != 1:
        dimensions = getattr(mesh, "ndim", None)
        what = repr(mesh) if dimensions is None else f"a DeviceMesh of {dimensions} dimensions"
        raise InvalidArgument(
            f'MoE: mesh is {what}; expected a DeviceMesh of one dimension, "communicator" or None',
            op="MoE",
            rank=comm.rank,
        )
    got = mesh.size(), mesh.get_local_rank(), mesh.device_type
    expected = comm.size, comm.rank, comm.device.type
    for name, value, wanted in zip(("size", "rank here", "device"), got, expected, strict=True):
        if value != wanted:
            raise InvalidArgument(
                f"MoE: the {name} of mesh is {value}; expected that of the Communicator, {wanted}",
                op="MoE",
                rank=comm.rank,
            )
    return mesh
