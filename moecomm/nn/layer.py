"""Layers: MoE, with its experts spread over the ranks of a Buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .gate import Gate
from .grouped import grouped_mm, grouped_mm_into
from ..tensors import plain

if TYPE_CHECKING:
    from ..buffer import Buffer
    from ..results import Pending


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the shared experts of a layer, as one.

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
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """SwiGLU experts first .. first + count - 1 of a layer, multiplied as groups.

    In a state_dict each has its own keys with its global number (`12.gate_proj.weight`, `12.up_proj.weight`,
    `12.down_proj.weight`), so the dicts of all ranks together are one checkpoint that any number of ranks can load:
    a rank takes its own experts and leaves the others.

    Parameters
    ----------
    hidden, intermediate, count, first : int
    dtype : torch.dtype, optional
    """

    def __init__(
        self, hidden: int, intermediate: int, count: int, first: int = 0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.intermediate, self.count, self.first = intermediate, count, first
        made: Any = dict(dtype=dtype or torch.get_default_dtype(), device=torch.get_default_device())
        self.gate_up = nn.Parameter(torch.empty(count, 2 * intermediate, hidden, **made))
        self.down = nn.Parameter(torch.empty(count, hidden, intermediate, **made))
        nn.init.normal_(self.gate_up, std=hidden**-0.5)
        nn.init.normal_(self.down, std=intermediate**-0.5)

    def forward(
        self, x: torch.Tensor, rows_per_expert: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [N, hidden] in expert order -> [N, hidden].

        Parameters
        ----------
        x : Tensor [N, hidden]
            Rows after those of the last expert are zero.
        rows_per_expert : Tensor [count] int64
        out : Tensor [N, hidden], optional
            Where the result goes; without gradients only.
        """
        ends = rows_per_expert.cumsum(0)
        gate, up = grouped_mm(x, self.gate_up.transpose(1, 2), ends).chunk(2, -1)
        inner, down = nn.functional.silu(gate) * up, self.down.transpose(1, 2)
        return grouped_mm(inner, down, ends) if out is None else grouped_mm_into(out, inner, down, ends)

    def _own(self, prefix: str) -> Iterator[tuple[str, torch.Tensor, tuple[Any, ...]]]:
        for i in range(self.count):
            name = f"{prefix}{self.first + i}."
            yield f"{name}gate_proj.weight", self.gate_up, (i, slice(0, self.intermediate))
            yield f"{name}up_proj.weight", self.gate_up, (i, slice(self.intermediate, None))
            yield f"{name}down_proj.weight", self.down, (i,)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: Any) -> None:
        for key, parameter, at in self._own(prefix):
            destination[key] = (parameter if keep_vars else parameter.detach())[at]

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
        for key, parameter, at in self._own(prefix):
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != parameter[at].shape:
                error_msgs.append(
                    f"size mismatch for {key}: {list(state_dict[key].shape)}, expected {list(parameter[at].shape)}"
                )
            else:
                with torch.no_grad():
                    parameter[at].copy_(state_dict[key])

    def extra_repr(self) -> str:
        """What print(experts) says."""
        return f"{self.gate_up.shape[2]}, intermediate={self.intermediate}, experts {self.first}..{self.first + self.count - 1}"


class MoE(nn.Module):
    """A Mixture-of-Experts layer: gate, dispatch, this rank's experts, combine, plus the shared experts.

    Parameters
    ----------
    hidden, intermediate : int
        Elements of a token and inside an expert.
    num_experts, top_k : int
        Over all ranks, as for Buffer.
    shared_experts : int
        How many every token passes beside its picks; 0: none.
    buffer : Buffer
        For hidden, num_experts and top_k; its dtype is that of tokens and experts. Layers of one shape may share it.
    gate : Module, optional
        Called with tokens [T, hidden], returns topk_ids, topk_weights and whatever else. None: moecomm.gate.Gate.
    capacity : int, optional
        Static number of rows that this rank's experts compute (Buffer.dispatch); needed by torch.compile(fullgraph=True)
        and CUDA graphs.
    expert_alignment : int
        As for Buffer.dispatch.

    Raises
    ------
    InvalidArgument
        The buffer is for another shape.

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
        )
        self.shared_experts = (
            SwiGLU(hidden, shared_experts * intermediate, dtype=buffer.dtype) if shared_experts else None
        )

    def forward(self, x: torch.Tensor, with_routing: bool = False) -> Any:
        """[..., hidden] -> [..., hidden]. Collective; ranks may hold different numbers of tokens, also none.

        Parameters
        ----------
        x : Tensor [..., hidden] of the buffer's dtype
            Under torch.autocast of any dtype: the layer computes in the buffer's.
        with_routing : bool
            Also return what the gate returned (for a balance loss, counts or a bias update).
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
    ) -> Pending:
        """A Pending of this layer's dispatch, on the progress thread."""
        return self._dispatch(tokens, topk_ids, topk_weights, async_op=True)

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
        # Without gradients the experts write where combine reads; else their output is staged once.
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        rows = self.experts(out.x, out.rows_per_expert, out.handle.rows if in_place else None)
        return self.buffer.combine(rows, out.handle, topk_weights=out.topk_weights)

    def extra_repr(self) -> str:
        """What print(layer) says."""
        return f"ranks={self.buffer.comm.size}, capacity={self.capacity}, expert_alignment={self.expert_alignment}"
