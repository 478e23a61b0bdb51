"""Windows: the native memory for one shape, made collectively, and its growth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._cuda import cuda
from ._native import core
from .refusals import GROW
from .shapes import DTYPES, MOST_TOKENS, Shape, arena_size

if TYPE_CHECKING:
    from .memory import BufferMemory


class TooSmall(Exception):
    """A call failed on all ranks, because a rank has no space for its part. The ranks are in step."""

    def __init__(self, failure: Any) -> None:
        super().__init__()
        self.failure = failure


class Windows:
    """Memory of one Shape. Construction is collective."""

    def __init__(self, memory: BufferMemory, shape: Shape, check: bool, logical_experts: int) -> None:
        comm = memory.comm
        self.plan = None  # the launch plan on a GPU
        sizes = dict(
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            max_tokens=shape.max_tokens,
            dtype=shape.dtype,
        )
        if comm.gpu is not None:
            self.plan = cuda.plan_of(memory, **sizes, channels=shape.channels)
            shape = shape.but(channels=self.plan.channels)
            comm.collective.require_equal(
                "Buffer", comm.collective.exchange({"channels": shape.channels}, "Buffer")
            )
        self.shape = shape
        dimensions = shape.hidden, DTYPES[shape.dtype], shape.num_experts, shape.top_k, shape.max_tokens

        def make() -> Any:
            if comm.gpu is not None:
                return cuda.NativeBuffer(comm, self.plan, *dimensions, shape.arena_bytes, check)
            return core.Buffer(
                comm.native, *dimensions, shape.channels, shape.arena_bytes, check, logical_experts
            )

        self.native = comm.collective.join("Buffer", make)
        self.native.finish_connect()
        if comm.bootstrap.threads:
            comm.bootstrap.keep(self.native)
        self._users = 0

    def join(self) -> Windows:
        """Count a Buffer that uses them."""
        self._users += 1
        return self

    def leave(self, release: bool) -> None:
        """Remove a Buffer. With `release`, the last one frees the memory, except for parts that tensors view."""
        self._users -= 1
        if release and self._users == 0:
            self.native.release()


class Growth:
    """The parts of a Buffer's memory that can grow, and their sizes.

    Parameters
    ----------
    tokens : bool
        max_tokens grows with the calls.
    arena : bool
        The arena grows with the calls.
    """

    def __init__(self, tokens: bool, arena: bool) -> None:
        self.tokens, self.arena, self.most_tokens = tokens, arena, MOST_TOKENS
        self._dispatches = 2  # the arena has space for the worst case of this many

    def asks(self, failure: Any) -> bool:
        """Whether all ranks should agree on larger memory after this failure."""
        if failure.code == "refused":
            return bool(failure.detail == GROW)
        return bool(self.arena and failure.code == "capacity")

    def tokens_for(self, tokens: int) -> int:
        """Return max_tokens of memory for calls with up to this many tokens."""
        return min(max(16, 1 << (tokens - 1).bit_length() if tokens > 1 else 1), MOST_TOKENS)

    def arena_for(self, comm: Any, shape: Shape) -> int:
        """Return the bytes of the arena of such memory."""
        return arena_size(
            comm.size,
            shape.hidden,
            shape.num_experts,
            shape.top_k,
            shape.max_tokens,
            shape.dtype,
            self._dispatches,
        )

    def agree(self, comm: Any, op: str, shape: Shape, tokens: int, failure: Any) -> Shape | None:
        """Return the shape for the failed call, equal on all ranks, or None if there is none. Collective."""
        short = failure.code == "capacity"
        everyone = comm.collective.exchange(
            [tokens, failure.expected if short else 0, failure.detail if short else 0], op
        )
        most, needed, beyond_capacity = (max(said[i] for said in everyone) for i in (0, 1, 2))
        if beyond_capacity:  # rows beyond the `capacity` of the call, on some rank
            return None
        if most > shape.max_tokens:
            shape = shape.but(max_tokens=self.tokens_for(most))
        if self.arena:
            before, self._dispatches = shape.arena_bytes, self._dispatches * (2 if needed else 1)
            room = max(self.arena_for(comm, shape), before)
            while needed and room < 2 * max(needed, before):
                room *= 2
            shape = shape.but(arena_bytes=room)
        return shape
