"""Payload: rows of any dtype for a dispatch. Routing: the plans of one routing, one per core Buffer."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import CapacityExceeded
from ...shapes import DTYPES
from ._arrival import counted
from ._checks import capturing
from .errors import refuse, require_tensor

_FP8 = torch.float8_e4m3fn
DTYPE_NUMBERS = {
    dtype: i
    for i, dtype in enumerate(
        (*DTYPES, _FP8, torch.float8_e5m2, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    )
}


class Payload:
    """Rows of a dispatch, and their scales if any, in a form that a core Buffer accepts.

    Rows of a dtype that the core supports are sent unchanged, and so are FP8 rows with one scale per 128 elements.
    Anything else (bytes, other FP8 types, scales per 32 elements, ...) is sent as bytes: the row and the scales of a
    token form one row.

    Parameters
    ----------
    op : str
        For error texts.
    x : Tensor [T, H], or (Tensor [T, H], scales [T, n])

    Raises
    ------
    InvalidArgument
        x is none of these, its dtype is unknown, or a row is not a multiple of 16 bytes.
    """

    def __init__(self, op: str, x: Any) -> None:
        pair = isinstance(x, (tuple, list))
        if pair and len(x) != 2:
            refuse(op, f"x is a {type(x).__name__} of {len(x)}; expected a tensor, or (rows, scales)")
        rows = require_tensor(op, "x", x[0] if pair else x, shape=(None, None))
        scales: Any = (
            require_tensor(op, "the scales of x", x[1], shape=(rows.shape[0], None)) if pair else None
        )
        self.tokens, self.width, self.rows_dtype = rows.shape[0], rows.shape[1], rows.dtype
        self.row_bytes = self.width * rows.dtype.itemsize
        self.scales_dtype: Any
        self.scale_bytes: int
        self.scales_dtype, self.scale_bytes = (
            (None, 0) if scales is None else (scales.dtype, scales.shape[1] * scales.dtype.itemsize)
        )
        if rows.dtype not in DTYPE_NUMBERS or (pair and scales.dtype not in DTYPE_NUMBERS):
            refuse(
                op,
                f"x is {rows.dtype}{f' with scales {scales.dtype}' if pair else ''}; expected one of "
                f"{', '.join(map(str, DTYPE_NUMBERS))}",
            )
        if not self.width or self.row_bytes % 16:
            refuse(op, f"a row of x has {self.row_bytes} bytes; expected a multiple of 16")
        self._packed = False
        if rows.dtype in DTYPES and not pair:
            self.x, self.hidden, self.dtype = rows, self.width, rows.dtype
        elif (
            rows.dtype == _FP8
            and pair
            and (scales.dtype, scales.shape[1])
            in ((torch.float32, -(-self.width // 128)), (torch.int32, -(-self.width // 512)))
        ):
            self.x, self.hidden, self.dtype = (rows, scales), self.width, torch.bfloat16
        else:
            self._packed, self.dtype = True, torch.bfloat16
            total = self.row_bytes + self.scale_bytes
            self.hidden = -(-total // 16) * 8
            self.x = torch.zeros((self.tokens, 2 * self.hidden), dtype=torch.uint8, device=rows.device)
            self.x[:, : self.row_bytes] = rows.view(torch.uint8)
            if pair:
                self.x[:, self.row_bytes : total] = scales.clone(memory_format=torch.contiguous_format).view(
                    torch.uint8
                )  # .contiguous() would keep the stride of a single column
            self.x = self.x.view(torch.bfloat16)

    @property
    def arrives_in_place(self) -> bool:
        """Whether received() does not read the received rows."""
        return not self._packed

    @property
    def same(self) -> Any:
        """{name: value} that must be equal on all ranks."""
        return {
            "bytes per row of x": self.row_bytes,
            "the dtype of x (by number)": DTYPE_NUMBERS[self.rows_dtype],
            "bytes of scales per token": self.scale_bytes,
            "the dtype of the scales (by number)": DTYPE_NUMBERS.get(self.scales_dtype, -1),
        }

    def received(self, out: Any) -> Any:
        """Received rows in the caller's form: Tensor [N, H], or (rows, scales)."""
        if not self._packed:
            return (out.x, out.scales) if isinstance(self.x, tuple) else out.x
        raw = out.x.view(torch.uint8)
        rows = raw[:, : self.row_bytes].contiguous().view(self.rows_dtype)
        if self.scales_dtype is None:
            return rows
        return rows, raw[:, self.row_bytes : self.row_bytes + self.scale_bytes].contiguous().view(
            self.scales_dtype
        )


class Routing:
    """The routing of one dispatch, reusable by later dispatches and combines of any row size.

    Parameters
    ----------
    world : World
    ids : Tensor [T, top_k]
        Global expert ids of this rank's tokens. Kept.
    experts, most, num_sms : int
        Experts over all ranks, maximum of T over ranks, multiprocessors.
    how : dict
        layout, expert_alignment and capacity for dispatch of the core.
    """

    def __init__(self, world: Any, ids: Any, experts: Any, most: Any, num_sms: int, how: Any) -> None:
        self.world, self.ids, self.experts, self.most, self.num_sms, self.how = (
            world,
            ids,
            experts,
            most,
            num_sms,
            how,
        )
        self.tokens = ids.shape[0]
        self._plans: dict[Any, Any] = {}
        self.num_rows = None
        self.arrival: Any = None  # Arrival of the latest dispatch, if its rows may be in flight

    def dispatch(
        self, hidden: int, dtype: torch.dtype, x: Any, weights: Any = None, asynchronous: bool = False
    ) -> Any:
        """Dispatch x with the plan of an earlier call on this core Buffer, or a new plan of the same row order.

        Collective. Returns Dispatched. asynchronous: only its counts and shapes are known then; wait for .arrival.
        """
        self.settle()
        how = dict(async_op=True) if asynchronous and not capturing() else {}
        key = hidden, dtype
        if key in self._plans:
            core, handle = self._plans[key]
            try:
                out, self.arrival = counted(core.dispatch(x, topk_weights=weights, handle=handle, **how))
                return out
            except CapacityExceeded:  # raised on all ranks: results of earlier calls fill the arena
                del self._plans[key]
        core = self.world.core(
            hidden, self.experts, self.ids.shape[1], dtype, self.most, num_sms=self.num_sms
        )
        core, out, self.arrival = self.world.dispatch(core, x, self.ids, weights, **self.how, **how)
        self._plans[key] = core, out.handle
        self.world.last[False] = core
        self.num_rows = out.handle.num_rows
        return out

    def settle(self) -> None:
        """Wait for the rows of the latest dispatch, or raise its error. On a GPU the current stream waits."""
        arrival, self.arrival = self.arrival, None
        if arrival is not None:
            arrival.wait()

    @property
    def first(self) -> Any:
        """(core Buffer, its handle) of the dispatch that made this routing."""
        return next(iter(self._plans.values()))

    def plan(self, hidden: int, dtype: torch.dtype) -> Any:
        """Return (core Buffer, its handle) for a row size.

        For a new row size a dispatch of zeros makes them, which is collective.
        """
        self.settle()
        if (hidden, dtype) not in self._plans:
            self.dispatch(
                hidden, dtype, torch.zeros((self.tokens, hidden), dtype=dtype, device=self.ids.device)
            )
        return self._plans[hidden, dtype]

    def combine(self, rows: Any, bias: Any = None, **how: Any) -> Any:
        """Return the sum of each token's rows, [T, H]. Collective."""
        core, handle = self.plan(rows.shape[1], rows.dtype)
        return core.combine(rows, handle, bias=bias, **how)

    def combine_with(self, rows: Any, numbers: Any, bias: Any = None) -> Any:
        """Return the sums of each token's rows, [T, H], and of their numbers [N, n], float32 [T, n]. Collective."""
        core, handle = self.plan(rows.shape[1], rows.dtype)
        if numbers is not None and handle.layout == "rank" and numbers.shape[1] == core.top_k:
            return core.combine(
                rows, handle, topk_weights=numbers.contiguous(), bias=bias, return_weights=True
            )
        y = core.combine(rows, handle, bias=bias)
        return y, None if numbers is None else self.combine_numbers(numbers)

    def combine_numbers(self, numbers: Any) -> Any:
        """Return sums of numbers float32 [N, n] over each token's rows, [T, n], by a separate combine. Collective."""
        n = numbers.shape[1]
        rows = torch.nn.functional.pad(numbers, (0, -n % 4))
        return self.combine(rows)[:, :n].contiguous()
