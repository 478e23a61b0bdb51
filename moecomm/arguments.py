"""Checks of the arguments of a Buffer's calls. A wrong argument is refused by name before any data moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ._native.quant import scale_words
from .elastic.verdict import require_generation
from .results import Handle
from .shapes import QUANTS, SCALE_DTYPES, WIRES
from .tensors import plain, refuse

if TYPE_CHECKING:
    from .memory import BufferMemory
    from .opaque import Opaque

IDS = (torch.int64, torch.int32)
FLOATS = (torch.float32,)

_MOST_ROWS = (1 << 31) - 1


def known(value: Any, table: dict[str | None, int]) -> bool:
    """Whether the value is one of the table's names. It may be of any type."""
    return (value is None or isinstance(value, str)) and value in table


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share bytes. False for traced tensors."""
    if torch.compiler.is_compiling() or not a.numel() or not b.numel():
        return False
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def overlaps(t: torch.Tensor, at: int, size: int) -> bool:
    """Whether a contiguous tensor has bytes in [at, at + size)."""
    return (
        not torch.compiler.is_compiling()
        and t.numel() > 0
        and t.data_ptr() < at + size
        and at < t.data_ptr() + t.nbytes
    )


def extent(block: Any) -> tuple[int, int]:
    """Return (address, bytes) of a Block of any world."""
    if hasattr(block, "__cuda_array_interface__"):
        described = block.__cuda_array_interface__
        return described["data"][0], described["shape"][0]
    return block.address, block.nbytes


def describe(t: torch.Tensor) -> str:
    """Describe a tensor: dtype, shape, device, and whether it is contiguous."""
    return f"{'' if t.is_contiguous() else 'non-contiguous '}{t.dtype} {list(t.shape)} on {t.device}"


class Checks:
    """Checks of the arguments of one Buffer, with one method per argument. Each raises InvalidArgument.

    The BufferMemory has the expected values: hidden, top_k, max_tokens, dtype, and the communicator's device.
    """

    def __init__(self, memory: BufferMemory) -> None:
        self._memory = memory

    def refuse(self, op: str, what: str) -> NoReturn:
        """Raise InvalidArgument of a call on this rank.

        Raises
        ------
        InvalidArgument
        """
        refuse(op, what, self._memory.comm.rank)

    # -- conversion -------------------------------------------------------------------------------

    def as_tensor(self, op: str, name: str, value: Any, optional: bool = False, written: bool = False) -> Any:
        """Return an argument as a plain tensor (moecomm.tensors)."""
        return plain(
            op,
            name,
            value,
            rank=self._memory.comm.rank,
            optional=optional,
            written=written,
            traceable=op in ("dispatch", "combine"),
        )

    def as_rows(self, op: str, x: Any) -> tuple[Any, Any]:
        """Return (rows, scales or None) of x, which is a tensor, or a tuple of both."""
        if not isinstance(x, tuple):
            return self.as_tensor(op, "x", x), None
        if len(x) != 2:
            self.refuse(op, f"x is a tuple of {len(x)}; expected a tensor, or (fp8 rows, scales)")
        return self.as_tensor(op, "x", x[0]), self.as_tensor(op, "scales", x[1])

    def as_bias(self, op: str, bias: Any, handle: Handle) -> torch.Tensor | None:
        """Return the bias as one tensor. A pair is summed in FP32."""
        if not isinstance(bias, (tuple, list)):
            one: torch.Tensor | None = self.as_tensor(op, "bias", bias, optional=True)
            return one
        if len(bias) != 2:
            self.refuse(
                op, f"bias is a {type(bias).__name__} of {len(bias)}; expected a tensor, or a pair of them"
            )
        both: list[torch.Tensor] = [self.as_tensor(op, "bias", each) for each in bias]
        for each in both:
            self.bias(op, each, handle.num_tokens)
        return both[0].to(torch.float32) + both[1].to(torch.float32)

    # -- calls ------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        layout: str,
        expert_alignment: Any,
        capacity: Any,
        handle: Handle | None = None,
        opaque: Opaque | None = None,
    ) -> None:
        """Check the arguments of dispatch."""
        op = "dispatch"
        tokens = self.x(op, x, scales, packed=True) if opaque is None else self.opaque(op, opaque)
        if handle is not None:
            if topk_ids is not None:
                self.refuse(op, "topk_ids and handle are both given; expected one of them")
            if tokens != handle.num_tokens:
                self.refuse(
                    op, f"x has {tokens} tokens; expected {handle.num_tokens}, as in the plan of handle"
                )
        elif layout not in ("expert", "rank"):
            self.refuse(op, f"layout is {layout!r}; expected 'expert' or 'rank'")
        else:
            if topk_ids is None:
                self.refuse(op, "topk_ids is None; expected ids [T, top_k], or a handle")
            self.picks(op, "topk_ids", topk_ids, tokens, IDS)
            if not isinstance(expert_alignment, int) or not 1 <= expert_alignment <= 65536:
                self.refuse(op, f"expert_alignment is {expert_alignment!r}; expected an int in 1..65536")
            if layout == "rank" and expert_alignment != 1:
                self.refuse(
                    op,
                    f"expert_alignment is {expert_alignment}; expected 1 in the rank layout, without padding",
                )
            if capacity is not None and (not isinstance(capacity, int) or not 0 <= capacity <= _MOST_ROWS):
                self.refuse(op, f"capacity is {capacity!r}; expected an int >= 0, at most 2**31 - 1")
        if topk_weights is not None:
            self.picks(op, "topk_weights", topk_weights, tokens, FLOATS)

    def combine(
        self,
        rows: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        wire: str | None = None,
        return_weights: bool = False,
    ) -> None:
        """Check the arguments of combine."""
        op, memory = "combine", self._memory
        if return_weights and topk_weights is None:
            self.refuse(op, "return_weights is True but topk_weights is None; expected weights")
        self.wire(op, wire)
        n, tokens = handle.num_rows, handle.num_tokens
        self.tensor(op, "rows", rows, (memory.dtype,), (n, memory.hidden))
        if topk_weights is not None and return_weights and handle.layout == "rank":
            self.tensor(op, "topk_weights", topk_weights, FLOATS, (n, memory.top_k))
        elif topk_weights is not None:
            if handle.layout == "rank":
                self.refuse(
                    op,
                    "topk_weights is given; expected None or return_weights=True, since in the rank layout the experts "
                    "apply the weights",
                )
            self.tensor(op, "topk_weights", topk_weights, FLOATS, (n,))
        if bias is not None:
            self.bias(op, bias, tokens)
        if out is not None:
            self.tensor(op, "out", out, (memory.dtype,), (tokens, memory.hidden))
        self.apart(op, out, rows=rows, topk_weights=topk_weights, bias=bias)
        self.staging(op, rows, handle, topk_weights=topk_weights, bias=bias)
        self.start(op, out=out)

    # -- single arguments -------------------------------------------------------------------------

    def tensor(
        self, op: str, name: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
    ) -> None:
        """Check for a contiguous tensor with one of these dtypes and this shape, on the buffer's device."""
        device = self._memory.comm.device
        if t.dtype not in dtypes or t.device != device or t.shape != shape or not t.is_contiguous():
            wanted = f"{' or '.join(map(str, dtypes))} {list(shape)} on {device}"
            self.refuse(op, f"{name} is {describe(t)}; expected contiguous {wanted}")

    def picks(
        self, op: str, name: str, t: torch.Tensor, tokens: int, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """Check a tensor with one value per pick."""
        self.tensor(op, name, t, dtypes, (tokens, self._memory.top_k))

    def back(self, back: torch.Tensor, handle: Handle) -> None:
        """Check the values that combine_slots sends back to the picks."""
        n = handle.num_rows
        shape = (n,) if handle.layout == "expert" else (n, self._memory.top_k)
        self.tensor("combine_slots", "back", back, FLOATS, shape)

    def bias(self, op: str, bias: torch.Tensor, tokens: int) -> None:
        """Check a bias: one row, or one row per token."""
        memory = self._memory
        if (
            bias.device != memory.comm.device
            or not bias.is_floating_point()
            or tuple(bias.shape) not in ((memory.hidden,), (tokens, memory.hidden))
        ):
            self.refuse(
                op,
                f"bias is {describe(bias)}; expected [{memory.hidden}] or [{tokens}, {memory.hidden}] on "
                f"{memory.comm.device}",
            )

    def wire(self, op: str, wire: Any) -> None:
        """Check the wire format of combine."""
        exact = self._memory.dtype == torch.float64
        if not known(wire, WIRES) or (wire is not None and exact):
            choices = "None for float64" if exact else "one of " + ", ".join(map(repr, WIRES))
            self.refuse(op, f"wire is {wire!r}; expected {choices}")

    def x(self, op: str, x: torch.Tensor, scales: torch.Tensor | None, packed: bool = False) -> int:
        """Check rows, and the scales of quantized rows. Return the number of rows.

        With packed, int32 scales are valid, too.
        """
        memory = self._memory
        device = memory.comm.device
        want = memory.dtype if scales is None else torch.float8_e4m3fn
        if (
            x.dtype != want
            or x.device != device
            or x.dim() != 2
            or x.shape[1] != memory.hidden
            or not x.is_contiguous()
        ):
            self.refuse(
                op, f"x is {describe(x)}; expected contiguous {want} [T, {memory.hidden}] on {device}"
            )
        self.start(op, x=x)
        tokens = x.shape[0]
        if op.startswith("decode"):
            if tokens > memory.decode_max_tokens:
                self.refuse(
                    op,
                    f"x has {tokens} tokens; expected at most decode_max_tokens = {memory.decode_max_tokens}",
                )
        else:
            self._tokens(op, tokens)
        if scales is not None:
            self._quantizes(op)
            kinds = (1, 2) if packed else (1,)
            fits = {SCALE_DTYPES[kind]: (tokens, scale_words(memory.hidden, kind)) for kind in kinds}
            if (
                fits.get(scales.dtype) != tuple(scales.shape)
                or scales.device != device
                or not scales.is_contiguous()
            ):
                expected = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in fits.items())
                self.refuse(op, f"scales is {describe(scales)}; expected contiguous {expected} on {device}")
        return tokens

    def opaque(self, op: str, opaque: Opaque) -> int:
        """Check opaque rows. Return their number."""
        memory = self._memory
        self.start(op, x=opaque.rows)
        size, most, tokens = opaque.row_bytes + opaque.side_bytes, memory.row_bytes, len(opaque.rows)
        if size > most and (memory.comm.num_nodes > 1 or memory.comm.gpu is not None):
            self.refuse(
                op,
                f"x has {size} bytes per token; expected at most {most}, the bytes of a row of this buffer",
            )
        if opaque.rows.device != memory.comm.device:
            self.refuse(op, f"x is {describe(opaque.rows)}; expected it on {memory.comm.device}")
        self._tokens(op, tokens)
        return tokens

    def _tokens(self, op: str, tokens: int) -> None:
        most = self._memory.max_tokens
        if tokens > most and not self._memory.grows(tokens):
            self.refuse(op, f"x has {tokens} tokens; expected at most max_tokens = {most}")

    def _quantizes(self, op: str) -> None:
        if self._memory.hidden % 16:
            self.refuse(op, f"hidden is {self._memory.hidden}; expected a multiple of 16 for quantized rows")

    def quant(self, op: str, quant: Any, scale_layout: Any, scales: torch.Tensor | None) -> None:
        """Check the quantization in dispatch and the layout of its scales."""
        if not known(quant, QUANTS):
            self.refuse(op, f"quant is {quant!r}; expected one of {', '.join(map(repr, QUANTS))}")
        if quant is not None:
            self._quantizes(op)
            if scales is not None:
                self.refuse(op, f"quant is {quant!r} but x is already quantized; expected None")
            if self._memory.dtype == torch.float64:
                self.refuse(op, f"quant is {quant!r}; expected None for float64 rows")
        if scale_layout not in ("row", "column"):
            self.refuse(op, f"scale_layout is {scale_layout!r}; expected 'row' or 'column'")
        if scale_layout == "column" and quant is None and scales is None:
            self.refuse(op, "scale_layout is 'column' but rows are not quantized; expected 'row'")

    def numbers(self, op: str, topk_weights: torch.Tensor | None) -> None:
        """Refuse NaN in the weights, for check=True."""
        if topk_weights is not None and bool(torch.isnan(topk_weights).any()):
            self.refuse(op, "topk_weights has NaN; expected numbers, since check is True")

    def handle(self, op: str, handle: Any) -> None:
        """Check for a Handle of this buffer, or of a buffer with the same communicator and shape."""
        if not isinstance(handle, Handle):
            self.refuse(op, f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch")
        require_generation(self._memory.comm, op, "handle", getattr(handle.memory, "comm", None))
        if not self._memory.serves(handle):
            self.refuse(
                op,
                "handle belongs to a buffer of another communicator or shape; expected a handle of a buffer with this "
                "communicator and shape",
            )

    # -- memory -----------------------------------------------------------------------------------

    def apart(self, op: str, out: torch.Tensor | None, **inputs: torch.Tensor | None) -> None:
        """Refuse a result that overlaps an input or a window.

        The call writes the result while this rank and its peers still read those.
        """
        if out is None:
            return
        for name, t in inputs.items():
            if t is not None and shares_memory(out, t):
                self.refuse(op, f"out shares memory with {name}; expected separate memory")
        if self._in_windows(out):
            self.refuse(
                op,
                "out is in a window of this buffer (handle.rows, or the result of a dispatch), which peers read during "
                "the call; expected other memory",
            )

    def _in_windows(self, t: torch.Tensor) -> bool:
        """Whether a tensor has bytes in memory that this buffer shares with its peers."""
        natives = {*self._memory.natives(), *self._memory.former}
        return any(overlaps(t, *native.window()) for native in natives)

    def staging(self, op: str, rows: torch.Tensor, handle: Handle, **inputs: torch.Tensor | None) -> None:
        """Refuse inputs in handle.rows if the call copies rows there first."""
        given = {name: t for name, t in inputs.items() if t is not None}
        if (
            not given
            or torch.compiler.is_compiling()
            or handle.output is None
            or overlaps(rows, *handle.memory.window())
        ):
            return
        for name, t in given.items():
            if overlaps(t, *extent(handle.output)):
                self.refuse_staged(op, name)

    def refuse_staged(self, op: str, name: str) -> NoReturn:
        """Refuse an input in memory to which rows are copied first.

        Raises
        ------
        InvalidArgument
        """
        self.refuse(
            op,
            f"{name} is in handle.rows, to which rows are copied first; expected other memory, or rows = handle.rows",
        )

    def start(self, op: str, **tensors: torch.Tensor | None) -> None:
        """Refuse rows that are not 16-byte aligned on a GPU, whose kernels would fail with an unspecific error."""
        if self._memory.comm.gpu is None or torch.compiler.is_compiling():
            return
        for name, t in tensors.items():
            if t is not None and t.numel() and t.data_ptr() % 16:
                self.refuse(
                    op,
                    f"{name} must be 16-byte aligned, but its address is {t.data_ptr() % 16} mod 16; pass "
                    f"{name}.clone()",
                )
