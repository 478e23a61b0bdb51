"""What the arguments of a Buffer's calls must be: a wrong one is named before anything moves."""

from __future__ import annotations

import torch

from ._native.quant import scale_words
from .checks import require
from .env import Environment
from .errors import InvalidArgument
from .tracing.recorder import check_folder
from .results import Handle
from .shapes import QUANTS, SCALE_DTYPES, WIRES, arena_size, check_shape, decode_tokens, default_channels
from .tensors import plain

_MOST_ROWS = (1 << 31) - 1


def known(value, table):
    """Whether it is one of the table's names; a list, say, is none."""
    return (value is None or isinstance(value, str)) and value in table


def require_comm(comm):
    """Refuse what is no Communicator.

    Raises
    ------
    InvalidArgument
    """
    if not hasattr(comm, "ranks_per_node"):
        raise InvalidArgument(
            f"Buffer: comm is a {type(comm).__qualname__}; expected a Communicator", op="Buffer"
        )


def shares_memory(a, b):
    """Whether two contiguous tensors have bytes in common; traced ones have none."""
    if torch.compiler.is_compiling() or not a.numel() or not b.numel():
        return False
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def overlaps(t, at, size):
    """Whether a contiguous tensor has bytes in [at, at + size)."""
    return (
        not torch.compiler.is_compiling()
        and t.numel() > 0
        and t.data_ptr() < at + size
        and at < t.data_ptr() + t.nbytes
    )


def extent(block):
    """(address, bytes) of a Block of any world."""
    if hasattr(block, "__cuda_array_interface__"):
        described = block.__cuda_array_interface__
        return described["data"][0], described["shape"][0]
    return block.address, block.nbytes


def describe(t):
    """A tensor in words: dtype, shape, device, and whether it has gaps."""
    return f"{'' if t.is_contiguous() else 'non-contiguous '}{t.dtype} {list(t.shape)} on {t.device}"


class Arguments:
    """The checks of Buffer, which says hidden, top_k, max_tokens, dtype and comm."""

    def _agree(self, shape, decode, record, placement, replicas, activate, monitor, decode_max_tokens):
        """(MOECOMM_CHECK, hidden, ... decode_max_tokens) of a Buffer that is being made, with what was left open filled in. Collective: what is wrong on one
        rank, or differs, is raised on all."""
        comm = self.comm

        def mine():
            env = Environment()
            if not isinstance(decode, bool):
                raise InvalidArgument(
                    f"Buffer: decode is a {type(decode).__qualname__}; expected True or False",
                    op="Buffer",
                    rank=comm.rank,
                )
            hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, rank, arena_bytes = shape
            if placement is not None:  # from here on, experts are slots
                require(
                    hasattr(placement, "router_type") and not isinstance(placement, type),
                    "Buffer",
                    "placement",
                    placement,
                    "a moecomm.balance.Placement",
                )
                placement.router_type.check(comm, placement, num_experts, replicas, activate, monitor)
                num_experts = placement.num_slots
            hidden, num_experts, top_k, max_tokens, _, channels, arena_bytes = check_shape(
                comm.size, hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, rank, arena_bytes
            )
            if record is not None:
                check_folder(record, rank, comm.size)
            channels = (
                channels
                or env.channels
                or (None if comm.device.type == "cuda" else default_channels(comm.num_nodes))
            )
            arena_bytes = arena_bytes or arena_size(comm.size, hidden, num_experts, top_k, max_tokens, dtype)
            how = (None, None, None) if placement is None else (placement.digest, replicas, activate)
            return dict(
                hidden=hidden,
                num_experts=num_experts,
                top_k=top_k,
                max_tokens=max_tokens,
                channels=channels,
                arena_bytes=arena_bytes,
                decode_max_tokens=decode_tokens(decode_max_tokens, max_tokens, rank),
                dtype=str(dtype),
                decode=decode,
                MOECOMM_CHECK=env.check,
                placement=how[0],
                replicas=how[1],
                activate=how[2],
            )

        everyone = comm._everywhere("Buffer", mine)
        comm._require_equal("Buffer", everyone)
        return everyone[0]["MOECOMM_CHECK"], list(everyone[0].values())[:7]

    def _refuse(self, op, what):
        raise InvalidArgument(f"{op} on rank {self.comm.rank}: {what}", op=op, rank=self.comm.rank)

    def _as_tensor(self, op, name, value, optional=False, written=False):
        """An argument as a plain tensor (moecomm.tensors)."""
        return plain(
            op,
            name,
            value,
            rank=self.comm.rank,
            optional=optional,
            written=written,
            traceable=op in ("dispatch", "combine"),
        )

    def _as_rows(self, op, x):
        """(rows, scales or None) of x, which is a tensor, or both in a tuple."""
        if not isinstance(x, tuple):
            return self._as_tensor(op, "x", x), None
        if len(x) != 2:
            self._refuse(op, f"x is a tuple of {len(x)}; expected a tensor, or (fp8 rows, scales)")
        return self._as_tensor(op, "x", x[0]), self._as_tensor(op, "scales", x[1])

    def _check_dispatch(
        self, x, scales, topk_ids, topk_weights, layout, expert_alignment, capacity, handle=None
    ):
        op = "dispatch"
        tokens = self._check_x(op, x, scales, packed=True)
        if handle is not None:
            if topk_ids is not None:
                self._refuse(op, "topk_ids and handle are both given; expected one of them")
            if tokens != handle.num_tokens:
                self._refuse(op, f"x has {tokens} tokens; the handle's plan is for {handle.num_tokens}")
        elif layout not in ("expert", "rank"):
            self._refuse(op, f"layout is {layout!r}; expected 'expert' or 'rank'")
        else:
            if topk_ids is None:
                self._refuse(op, "topk_ids is None; expected ids [T, top_k], or a handle")
            self._check_picks(op, "topk_ids", topk_ids, tokens, (torch.int64, torch.int32))
            if not isinstance(expert_alignment, int) or not 1 <= expert_alignment <= 65536:
                self._refuse(op, f"expert_alignment is {expert_alignment!r}; expected an int in 1..65536")
            if layout == "rank" and expert_alignment != 1:
                self._refuse(
                    op, f"expert_alignment is {expert_alignment}; the rank layout has no padding, expected 1"
                )
            if capacity is not None and (not isinstance(capacity, int) or not 0 <= capacity <= _MOST_ROWS):
                self._refuse(op, f"capacity is {capacity!r}; expected an int >= 0, at most 2**31 - 1")
        if topk_weights is not None:
            self._check_picks(op, "topk_weights", topk_weights, tokens, (torch.float32,))

    def _check_combine(self, rows, handle, topk_weights, bias, out=None, wire=None):
        op = "combine"
        if not known(wire, WIRES) or (wire is not None and self.dtype == torch.float64):
            choices = (
                "None for float64" if self.dtype == torch.float64 else "one of " + ", ".join(map(repr, WIRES))
            )
            self._refuse(op, f"wire is {wire!r}; expected {choices}")
        n, tokens = handle.num_rows, handle.num_tokens
        if (
            rows.dtype != self.dtype
            or rows.device != self.comm.device
            or rows.shape != (n, self.hidden)
            or not rows.is_contiguous()
        ):
            self._refuse(
                op,
                f"rows is {describe(rows)}; expected contiguous {self.dtype} [{n}, {self.hidden}] on {self.comm.device}",
            )
        if topk_weights is not None:
            if handle.layout == "rank":
                self._refuse(
                    op,
                    "topk_weights is given; in the rank layout the experts have applied them, expected None",
                )
            self._check_floats(op, "topk_weights", topk_weights, (n,))
        if bias is not None and (
            bias.device != self.comm.device
            or not bias.is_floating_point()
            or tuple(bias.shape) not in ((self.hidden,), (tokens, self.hidden))
        ):
            self._refuse(
                op,
                f"bias is {describe(bias)}; expected [{self.hidden}] or [{tokens}, {self.hidden}] on {self.comm.device}",
            )
        if out is not None and (
            out.dtype != self.dtype
            or out.device != self.comm.device
            or out.shape != (tokens, self.hidden)
            or not out.is_contiguous()
        ):
            self._refuse(
                op,
                f"out is {describe(out)}; expected contiguous {self.dtype} [{tokens}, {self.hidden}] on {self.comm.device}",
            )
        self._check_apart(op, out, rows=rows, topk_weights=topk_weights, bias=bias)
        self._check_staging(op, rows, handle, topk_weights=topk_weights, bias=bias)
        self._check_start(op, out=out)

    def _check_apart(self, op, out, **inputs):
        """The result is written while this rank, and its peers, still read the inputs and the windows."""
        if out is None:
            return
        for name, t in inputs.items():
            if t is not None and shares_memory(out, t):
                self._refuse(op, f"out shares memory with {name}; expected memory of its own")
        if self._in_windows(out):
            self._refuse(
                op,
                "out lies in a window of this buffer (handle.rows, or the result of a dispatch), which peers read during the call; expected "
                "memory outside of it",
            )

    def _in_windows(self, t):
        """Whether some bytes of a tensor are in memory that this buffer shares with its peers."""
        windows = (
            [self._native.window()]
            if self._decode is None
            else [self._native.window(), self._decode.native.window()]
        )
        return any(overlaps(t, at, size) for at, size in windows)

    def _check_staging(self, op, rows, handle, **inputs):
        """Rows from elsewhere are copied to handle.rows first: what else the call reads must not lie there."""
        given = {name: t for name, t in inputs.items() if t is not None}
        if (
            not given
            or torch.compiler.is_compiling()
            or handle._output is None
            or overlaps(rows, *self._native.window())
        ):
            return
        for name, t in given.items():
            if overlaps(t, *extent(handle._output)):
                self._refuse(
                    op,
                    f"{name} lies in handle.rows, to which rows are copied first; expected memory of its own, or rows = handle.rows",
                )

    def _check_start(self, op, **tensors):
        """Kernels move rows by 16 bytes: where a row begins between two of these the GPU would stop with an error of its own."""
        if self.comm._gpu is None or torch.compiler.is_compiling():
            return
        for name, t in tensors.items():
            if t is not None and t.numel() and t.data_ptr() % 16:
                self._refuse(
                    op,
                    f"{name} starts {t.data_ptr() % 16} bytes behind a multiple of 16 in memory; expected none (a view that starts in the "
                    f"middle of another tensor: {name}.clone())",
                )

    def _check_back(self, back, handle):
        self._check_floats(
            "combine_slots",
            "back",
            back,
            (handle.num_rows,) if handle.layout == "expert" else (handle.num_rows, self.top_k),
        )

    def _check_x(self, op, x, scales, packed=False):
        want = self.dtype if scales is None else torch.float8_e4m3fn
        if (
            x.dtype != want
            or x.device != self.comm.device
            or x.dim() != 2
            or x.shape[1] != self.hidden
            or not x.is_contiguous()
        ):
            self._refuse(
                op, f"x is {describe(x)}; expected contiguous {want} [T, {self.hidden}] on {self.comm.device}"
            )
        self._check_start(op, x=x)
        tokens = x.shape[0]
        most, name = (
            (self.decode_max_tokens, "decode_max_tokens")
            if op.startswith("decode")
            else (self.max_tokens, "max_tokens")
        )
        if tokens > most:
            self._refuse(op, f"x has {tokens} tokens; expected at most {name} = {most}")
        if scales is not None:
            self._check_fp8_rows(op)
            kinds = (1, 2) if packed else (1,)
            want = {SCALE_DTYPES[kind]: (tokens, scale_words(self.hidden, kind)) for kind in kinds}
            if (
                want.get(scales.dtype) != tuple(scales.shape)
                or scales.device != self.comm.device
                or not scales.is_contiguous()
            ):
                expected = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in want.items())
                self._refuse(
                    op, f"scales is {describe(scales)}; expected contiguous {expected} on {self.comm.device}"
                )
        return tokens

    def _check_fp8_rows(self, op):
        if self.hidden % 16:
            self._refuse(op, f"hidden is {self.hidden}; quantized rows need a multiple of 16")

    def _check_quant(self, op, quant, scale_layout, scales):
        if not known(quant, QUANTS):
            self._refuse(op, f"quant is {quant!r}; expected one of {', '.join(map(repr, QUANTS))}")
        if quant is not None:
            self._check_fp8_rows(op)
            if scales is not None:
                self._refuse(op, f"quant is {quant!r} and x is quantized already; expected None")
            if self.dtype == torch.float64:
                self._refuse(op, f"quant is {quant!r}; float64 rows travel as they are, expected None")
        if scale_layout not in ("row", "column"):
            self._refuse(op, f"scale_layout is {scale_layout!r}; expected 'row' or 'column'")
        if scale_layout == "column" and quant is None and scales is None:
            self._refuse(op, "scale_layout is 'column' and rows are not quantized; expected 'row'")

    def _check_picks(self, op, name, t, tokens, dtypes):
        if (
            t.dtype not in dtypes
            or t.device != self.comm.device
            or t.shape != (tokens, self.top_k)
            or not t.is_contiguous()
        ):
            self._refuse(
                op,
                f"{name} is {describe(t)}; expected contiguous {' or '.join(map(str, dtypes))} [{tokens}, {self.top_k}] on {self.comm.device}",
            )

    def _check_floats(self, op, name, t, shape):
        if (
            t.dtype != torch.float32
            or t.device != self.comm.device
            or t.shape != shape
            or not t.is_contiguous()
        ):
            self._refuse(
                op,
                f"{name} is {describe(t)}; expected contiguous torch.float32 {list(shape)} on {self.comm.device}",
            )

    def _check_handle(self, op, handle):
        if not isinstance(handle, Handle):
            self._refuse(op, f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch")
        if handle._buffer is not self:
            self._refuse(op, "handle belongs to another buffer; expected one of this buffer")
