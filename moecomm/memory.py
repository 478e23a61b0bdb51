"""The native memory of a Buffer: made by its constructor or its first call, and replaced if a call needs more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import weakref

from .errors import raise_failure
from .refusals import GROW
from .results import Handle
from .shapes import Shape, reserved_bytes
from .tensors import refuse
from .windows import Growth, TooSmall, Windows

if TYPE_CHECKING:
    from .communicator import Communicator


class BufferMemory:
    """The Windows of a Buffer, and their sizes.

    .given is the Shape from the Buffer's arguments. .hidden to .arena_bytes are the sizes of the memory, None if the
    first call sets them. .native is the native memory for calls, or None; .former has the native parts of earlier
    Windows, which handles keep; .decode is the Decode of the decode path, or None. .plan is the launch plan on a GPU.
    """

    def __init__(
        self,
        comm: Communicator,
        given: Shape,
        growth: Growth,
        *,
        num_sms: int,
        check: bool,
        decode_max_tokens: Any,
    ) -> None:
        self.comm, self.given, self.growth = comm, given, growth
        self.num_sms, self.check, self.decode_max_tokens = num_sms, check, decode_max_tokens
        self.hidden: Any
        self.num_experts: Any
        self.top_k: Any
        self.max_tokens: Any
        self.dtype: Any
        self.channels: Any
        self.arena_bytes: Any
        self._take_shape(given)
        self.windows: Windows | None = None
        self.native: Any = None
        self.decode: Any = None
        self.plan: Any = None
        self.former: Any = weakref.WeakSet()
        self.closed = self.tracing = False

    def _take_shape(self, shape: Shape) -> None:
        self.hidden, self.num_experts, self.top_k, self.max_tokens = shape[:4]
        self.dtype, self.channels, self.arena_bytes = shape[4:]
        self.experts_per_rank: Any = (
            None if shape.num_experts is None else shape.num_experts // self.comm.size
        )
        self.row_bytes = shape.hidden * shape.dtype.itemsize if shape.hidden and shape.dtype else 0

    def use(self, windows: Windows) -> None:
        """Use these Windows for the following calls. Earlier handles keep theirs."""
        if self.windows is not None:
            self.former.add(self.native)
            self.windows.leave(release=False)
        self.windows, self.plan = windows.join(), windows.plan
        self._take_shape(windows.shape)
        if self.tracing:
            windows.native.trace(True)
        self.native = windows.native

    def make(self, shape: Shape, logical_experts: int = 0) -> Windows:
        """Make Windows of at least this shape. Collective. Buffers whose shape is set by the calls share theirs."""
        comm, by_shape = self.comm, self.comm.windows
        if not self.growth.tokens:
            return Windows(self, shape, self.check, logical_experts)
        key = (*shape.but(max_tokens=None, arena_bytes=None), self.num_sms, self.check)
        shared: Windows | None = by_shape.get(key)
        mine = (0, 0) if shared is None else (shared.shape.max_tokens, shared.shape.arena_bytes)
        everyone = comm.collective.exchange(list(mine), "Buffer")
        if (
            shared is not None
            and all(tuple(said) == mine for said in everyone)
            and mine[0] >= shape.max_tokens
            and mine[1] >= shape.arena_bytes
        ):
            return shared
        windows = Windows(self, shape, self.check, logical_experts)
        by_shape[key] = windows
        return windows

    def grow(self, op: str, tokens: int, failure: Any) -> None:
        """Make space for a call that failed on all ranks. Collective."""
        assert self.windows is not None
        shape = self.growth.agree(self.comm, op, self.windows.shape, tokens, failure)
        if shape is None:
            self.raise_failure(op, failure)
        self.use(self.make(shape))

    def grows(self, tokens: int) -> bool:
        """Whether the memory can grow for a dispatch of this many tokens."""
        return self.growth.tokens and tokens <= self.growth.most_tokens

    def ask_for_room(self) -> Any:
        """Take part in a dispatch with too many tokens for the memory; return the Failure that all ranks get."""
        return self.native.refuse("dispatch", 0, GROW)

    def agree_on_decode_tokens(self, mine: Any) -> None:
        """Agree on the memory for the first decode call. Collective. mine() returns this rank's tokens, or raises."""
        counts = self.comm.collective.everywhere("decode_dispatch", mine)
        self.decode_max_tokens = self.growth.tokens_for(max(counts))

    # -- handles ----------------------------------------------------------------------------------

    def sizes(self) -> tuple[Any, ...]:
        """Return the sizes that a handle must share with this Buffer."""
        return self.hidden, self.num_experts, self.top_k, self.dtype

    def serves(self, handle: Handle) -> bool:
        """Whether a Handle comes from a buffer of the same communicator and shape."""
        other = handle.owner.memory
        return other is self or (other.comm is self.comm and other.sizes() == self.sizes())

    def of(self, handle: Any) -> Any:
        """Return the native memory for a call with this handle; without a valid handle, that of the next dispatch."""
        if isinstance(handle, Handle) and handle.memory is not None and self.serves(handle):
            return handle.memory
        return self.native

    # -- inspection -------------------------------------------------------------------------------

    def natives(self) -> list[Any]:
        """Return the native parts that calls use now: dispatch and combine, then decode if it was used."""
        decode = self.decode
        found = [self.native, None if decode is None else decode.native]
        return [native for native in found if native is not None]

    def trace(self, on: bool) -> None:
        """Start or stop recording a timeline of the roles. Memory made later reads .tracing."""
        self.tracing = on
        for native in self.natives():
            native.trace(on)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's windows (reserved; committed when touched). 0 before they are made."""
        if self.native is None:
            return 0
        return reserved_bytes(
            self.comm,
            self.hidden,
            self.num_experts,
            self.top_k,
            self.max_tokens,
            self.dtype,
            self.channels,
            self.arena_bytes,
            self.decode is not None and self.decode_max_tokens,
        )

    @property
    def captured_bytes(self) -> int:
        """Bytes of the arena that are kept for calls in CUDA graphs. 0 in the cpu world."""
        return int(self.native.captured_bytes()) if self.comm.gpu is not None else 0

    # -- errors -----------------------------------------------------------------------------------

    def require_open(self, op: str) -> None:
        """Refuse a call of a closed Buffer or Communicator.

        Raises
        ------
        InvalidArgument
        """
        if self.closed:
            refuse(op, "the buffer is closed", self.comm.rank)
        self.comm.order.require_open(op)

    def fail(self, op: str, failure: Any) -> NoReturn:
        """Raise the error of a native Failure, or TooSmall if the memory can grow.

        Raises
        ------
        TooSmall, MoecommError
        """
        if self.growth.asks(failure):
            raise TooSmall(failure)
        self.raise_failure(op, failure)

    def raise_failure(self, op: str, failure: Any) -> NoReturn:
        """Raise the error of a native Failure.

        Raises
        ------
        MoecommError
        """
        raise_failure(failure, op=op, rank=self.comm.rank, describe_capacity=self._describe_capacity)

    def raise_late(self) -> None:
        """Raise what has become of calls on a GPU for which no host waited.

        Raises
        ------
        MoecommError
        """
        if self.closed or self.native is None:
            return
        failure = self.native.fault()
        if failure is not None:
            self.raise_failure("dispatch", failure)
        if self.decode is not None:
            self.decode.raise_late()

    def _describe_capacity(self, failure: Any) -> str:
        if failure.detail == 1:
            return "A larger `capacity` of dispatch enlarges it."
        held, blocks, total = self.native.arena()
        graphs = self.captured_bytes
        kept = f"; calls in CUDA graphs keep {graphs} of these until release_captured()" if graphs else ""
        return (
            f"This rank's arena has {total} bytes, of which {blocks} pieces of earlier dispatches hold {held}: drop "
            f"their tensors and handles, or give Buffer a larger `arena_bytes`{kept}."
        )

    def release(self, *, now: bool) -> None:
        """End the use of the memory. With now, free it, except for parts that tensors view."""
        if self.windows is not None:
            self.windows.leave(release=now)
        if now:
            self.decode = None
