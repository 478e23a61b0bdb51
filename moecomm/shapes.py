"""What a Buffer may be built for, and how many bytes that takes."""

from __future__ import annotations

import operator

import torch

from ._native import core
from .errors import InvalidArgument

# By the numbers that the native code knows them by.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
MAX_TOP_K = 32
QUANTS = {None: 0, "fp8": 1, "fp8_ue8m0": 2}
WIRES = {None: 0, "fp8": 1, "logfmt10": 2}
SCALE_DTYPES = (None, torch.float32, torch.int32)  # by the numbers of QUANTS


def reserved_bytes(comm, hidden, num_experts, top_k, max_tokens, dtype, channels, arena_bytes, decode):
    """Bytes of a rank's windows: reserved, and committed when touched. decode: tokens of the decode path; 0, False: there is none."""
    geometry, shape = (comm.rank, comm.size, comm.ranks_per_node), (hidden, DTYPES[dtype], num_experts, top_k)
    return core.buffer_bytes(*geometry, *shape, max_tokens, channels, arena_bytes) + (
        core.decode_bytes(*geometry, *shape, decode) if decode else 0
    )


def default_channels(num_nodes):
    """Channels of a Buffer that names none."""
    return 1 if num_nodes == 1 else 2


def arena_size(size, hidden, num_experts, top_k, max_tokens, dtype, dispatches=2):
    """Bytes of an arena that holds the worst case of `dispatches` dispatches: every token goes to one rank."""
    rows = size * max_tokens * min(top_k, num_experts // size)
    per_row = 2 * max(hidden * dtype.itemsize, hidden + 4 * ((hidden + 127) // 128) + 16) + 16 * top_k + 64
    return -(-dispatches * (rows * per_row + 65536) // 4096) * 4096


def decode_tokens(decode_max_tokens, max_tokens, rank):
    """Most tokens of a decode call; None: as many as of any other.

    Raises
    ------
    InvalidArgument
    """
    tokens = max_tokens if decode_max_tokens is None else as_int(decode_max_tokens)
    if not isinstance(tokens, int) or not 1 <= tokens <= max_tokens:
        raise InvalidArgument(
            f"Buffer: decode_max_tokens is {decode_max_tokens!r}; expected 1..max_tokens = {max_tokens}, or None for max_tokens",
            op="Buffer",
            rank=rank,
        )
    return tokens


def as_int(value):
    """Integers of any library (NumPy's, say) as Python's; everything else as it is."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def check_shape(
    size, hidden, num_experts, top_k, max_tokens, dtype, num_sms, channels, rank, arena_bytes=None
):
    """(hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes) as Python's integers; refuses what a Buffer cannot be built for.

    Raises
    ------
    InvalidArgument
    """

    def require(ok, name, value, expected):
        if not ok:
            raise InvalidArgument(f"Buffer: {name} is {value!r}; expected {expected}", op="Buffer", rank=rank)

    hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes = map(
        as_int, (hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes)
    )
    require(
        isinstance(dtype, torch.dtype) and dtype in DTYPES,
        "dtype",
        dtype,
        "one of " + ", ".join(map(str, DTYPES)),
    )
    require(
        isinstance(hidden, int) and hidden > 0 and hidden * dtype.itemsize % 16 == 0,
        "hidden",
        hidden,
        f"a row of a multiple of 16 bytes ({dtype.itemsize} bytes per element)",
    )
    require(
        isinstance(num_experts, int) and 0 < num_experts <= 65535 and num_experts % size == 0,
        "num_experts",
        num_experts,
        f"a multiple of the {size} ranks, at most 65535",
    )
    require(
        isinstance(top_k, int) and 1 <= top_k <= min(MAX_TOP_K, num_experts),
        "top_k",
        top_k,
        f"1..{min(MAX_TOP_K, num_experts)}",
    )
    require(isinstance(max_tokens, int) and 1 <= max_tokens <= 1 << 24, "max_tokens", max_tokens, "1..2**24")
    require(
        isinstance(num_sms, int) and num_sms >= 2 and num_sms % 2 == 0, "num_sms", num_sms, "an even int >= 2"
    )
    require(
        channels is None or (isinstance(channels, int) and 1 <= channels <= 1024),
        "channels",
        channels,
        "1..1024",
    )
    require(
        arena_bytes is None or (isinstance(arena_bytes, int) and 1 <= arena_bytes < 1 << 48),
        "arena_bytes",
        arena_bytes,
        "bytes, 1..2**48 - 1",
    )
    return hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes
