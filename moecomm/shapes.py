"""Valid sizes of a Buffer, and the bytes of its windows."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._native import core
from .env import Environment
from .errors import InvalidArgument

if TYPE_CHECKING:
    from .communicator import Communicator

# Numbers of the native code.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
MAX_TOP_K = 32
MOST_TOKENS = 1 << 24  # of a call
QUANTS = {None: 0, "fp8": 1, "fp8_ue8m0": 2}
WIRES = {None: 0, "fp8": 1, "logfmt10": 2}
MODES = ("local", "even", "optimal")  # choices of replicas
SCALE_DTYPES = (None, torch.float32, torch.int32)  # indexed by the numbers of QUANTS


class Shape(NamedTuple):
    """The sizes of native memory: integers, and a torch.dtype. None: not known yet; set by the calls.

    The fields are Any, because the Shape of Windows has no None.
    """

    hidden: Any
    num_experts: Any
    top_k: Any
    max_tokens: Any
    dtype: Any
    channels: Any
    arena_bytes: Any

    def but(self, **changes: Any) -> Shape:
        """Return a copy with changes."""
        return self._replace(**changes)

    def by_name(self) -> dict[str, Any]:
        """Return the sizes as a dict."""
        return self._asdict()

    @property
    def is_known(self) -> bool:
        """Whether memory can be made for it."""
        return None not in (self.hidden, self.num_experts, self.top_k, self.max_tokens, self.dtype)


SHAPE_NAMES = Shape._fields  # in their order


class World(NamedTuple):
    """The numbers of ranks and nodes on which sizes depend."""

    rank: int
    size: int
    ranks_per_node: int

    @property
    def num_nodes(self) -> int:
        """Number of nodes of equal size."""
        return self.size // self.ranks_per_node


def require_comm(comm: Any) -> None:
    """Refuse values that are not a Communicator.

    Raises
    ------
    InvalidArgument
    """
    if not hasattr(comm, "ranks_per_node"):
        raise InvalidArgument(
            f"Buffer: comm is a {type(comm).__qualname__}; expected a Communicator", op="Buffer"
        )


def world_of(op: str, comm: Communicator | None, size: Any, ranks_per_node: Any) -> World:
    """Return the World of a communicator, or of `size` future ranks. ranks_per_node None: one node.

    Raises
    ------
    InvalidArgument
        Both are given, or neither; ranks_per_node does not divide size.
    """
    if comm is not None:
        if size is not None or ranks_per_node is not None:
            raise InvalidArgument(
                f"{op}: comm is given, and also size or ranks_per_node; expected one of them", op=op
            )
        return World(comm.rank, comm.size, comm.ranks_per_node)
    size = as_int(size)
    if not isinstance(size, int) or size < 1:
        raise InvalidArgument(f"{op}: size is {size!r}; expected a number of ranks, or a Communicator", op=op)
    per_node = size if ranks_per_node is None else as_int(ranks_per_node)
    if not isinstance(per_node, int) or per_node < 1 or size % per_node:
        raise InvalidArgument(
            f"{op}: ranks_per_node is {ranks_per_node!r}; expected a divisor of the {size} ranks", op=op
        )
    return World(0, size, per_node)


def reserved_bytes(
    comm: World | Communicator,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype,
    channels: int,
    arena_bytes: int,
    decode: int | None,
) -> int:
    """Return the bytes of a rank's windows (reserved; committed when touched).

    decode: tokens of the decode path; 0 or False: no decode path.
    """
    geometry, shape = (comm.rank, comm.size, comm.ranks_per_node), (hidden, DTYPES[dtype], num_experts, top_k)
    return core.buffer_bytes(*geometry, *shape, max_tokens, channels, arena_bytes) + (
        core.decode_bytes(*geometry, *shape, decode) if decode else 0
    )


def default_channels(num_nodes: int) -> int:
    """Return the default number of channels of a Buffer."""
    return 1 if num_nodes == 1 else 2


def arena_size(
    size: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype,
    dispatches: int = 2,
) -> int:
    """Return the bytes of an arena for the worst case of `dispatches` dispatches: every token goes to one rank."""
    rows = size * max_tokens * min(top_k, num_experts // size)
    per_row = 2 * max(hidden * dtype.itemsize, hidden + 4 * ((hidden + 127) // 128) + 16) + 16 * top_k + 64
    return -(-dispatches * (rows * per_row + 65536) // 4096) * 4096


def decode_tokens(decode_max_tokens: Any, max_tokens: int, rank: int) -> int:
    """Return the maximum number of tokens of a decode call. None: that of other calls.

    Raises
    ------
    InvalidArgument
    """
    tokens = max_tokens if decode_max_tokens is None else as_int(decode_max_tokens)
    if not isinstance(tokens, int) or not 1 <= tokens <= max_tokens:
        raise InvalidArgument(
            f"Buffer: decode_max_tokens is {decode_max_tokens!r}; expected 1..max_tokens = {max_tokens}, or None for "
            "max_tokens",
            op="Buffer",
            rank=rank,
        )
    return tokens


def as_int(value: Any) -> Any:
    """Return integers of any library (such as NumPy) as int, and other values unchanged."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def check_shape(
    size: int,
    hidden: Any,
    num_experts: Any,
    top_k: Any,
    max_tokens: Any,
    dtype: Any,
    num_sms: Any,
    channels: Any,
    rank: int,
    arena_bytes: Any = None,
) -> tuple[int, int, int, int, int, int | None, int | None]:
    """Check the shape of a Buffer and return it as Python's integers.

    Returns (hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes).

    Raises
    ------
    InvalidArgument
    """

    def require(ok: bool, name: str, value: Any, expected: str) -> None:
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
        f"a multiple of 16 bytes per row ({dtype.itemsize} bytes per element)",
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
    require(
        isinstance(max_tokens, int) and 1 <= max_tokens <= MOST_TOKENS, "max_tokens", max_tokens, "1..2**24"
    )
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


def check_known(size: int, shape: Shape, num_sms: Any, rank: int) -> Shape:
    """Like check_shape, for the given part of a shape. Returns it with Python's integers.

    Raises
    ------
    InvalidArgument
    """
    hidden, num_experts, top_k, max_tokens, dtype, channels, arena_bytes = shape
    dtype_or_any = torch.bfloat16 if dtype is None else dtype
    most_picks = top_k if isinstance(as_int(top_k), int) and as_int(top_k) > 0 else 1
    checked = check_shape(
        size,
        16 if hidden is None else hidden,
        size * most_picks if num_experts is None else num_experts,
        1 if top_k is None else top_k,
        1 if max_tokens is None else max_tokens,
        dtype_or_any,
        num_sms,
        channels,
        rank,
        arena_bytes,
    )
    known = [None if was is None else now for was, now in zip(shape[:4], checked[:4], strict=True)]
    return Shape(known[0], known[1], known[2], known[3], dtype, checked[5], checked[6])


def size_hint(
    comm: Communicator | None = None,
    *,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    num_sms: int = 20,
    channels: int | None = None,
    arena_bytes: int | None = None,
    decode: bool = False,
    decode_max_tokens: int | None = None,
    size: int | None = None,
    ranks_per_node: int | None = None,
) -> int:
    """See Buffer.size_hint.

    Raises
    ------
    InvalidArgument
    """
    if comm is not None:
        require_comm(comm)
    world = world_of("size_hint", comm, size, ranks_per_node)
    hidden, num_experts, top_k, max_tokens, num_sms, channels, arena_bytes = check_shape(
        world.size,
        hidden,
        num_experts,
        top_k,
        max_tokens,
        dtype,
        num_sms,
        channels,
        world.rank,
        arena_bytes,
    )
    channels = channels or Environment().channels or default_channels(world.num_nodes)
    arena_bytes = arena_bytes or arena_size(world.size, hidden, num_experts, top_k, max_tokens, dtype)
    tokens = decode_tokens(decode_max_tokens, max_tokens, world.rank)
    return reserved_bytes(
        world, hidden, num_experts, top_k, max_tokens, dtype, channels, arena_bytes, decode and tokens
    )


def arena_hint(
    comm: Communicator | None = None,
    *,
    hidden: int,
    num_experts: int,
    top_k: int,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    dispatches: int = 2,
    size: int | None = None,
) -> int:
    """See Buffer.arena_hint.

    Raises
    ------
    InvalidArgument
    """
    world = world_of("arena_hint", comm, size, None)
    check_shape(world.size, hidden, num_experts, top_k, max_tokens, dtype, 20, None, world.rank)
    if not isinstance(dispatches, int) or dispatches < 1:
        raise InvalidArgument(
            f"arena_hint: dispatches is {dispatches!r}; expected an int >= 1",
            op="arena_hint",
            rank=world.rank,
        )
    return arena_size(world.size, hidden, num_experts, top_k, max_tokens, dtype, dispatches)


def require_count_dtype(dtype: torch.dtype) -> None:
    """Refuse dtypes that counts_as does not return.

    Raises
    ------
    InvalidArgument
    """
    if dtype not in (torch.int32, torch.int64):
        raise InvalidArgument(f"dtype is {dtype}; expected torch.int32 or torch.int64", op="counts_as")
