"""The steps of Buffer's constructor: agree on the arguments, make the Backend, open its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops, shapes
from ._cuda.record import DeviceRecorder
from .backend import Backend
from .decode import Decode
from .hooks import Hooks
from .making import Agreed, agree, host_communicator_of
from .memory import BufferMemory
from .shapes import Shape
from .tracing.recorder import Recorder
from .windows import Growth

if TYPE_CHECKING:
    from .communicator import Communicator

# Arguments of the Buffer on the host that chooses replicas for a Buffer on a GPU.
_OF_HOST_BUFFER = ("top_k", "max_tokens", "placement", "replicas", "activate")


def agreed_arguments(comm: Communicator, given: Shape, *arguments: Any) -> Agreed:
    """Check the arguments of Buffer on all ranks. Collective.

    Raises
    ------
    InvalidArgument, ConfigMismatch
    """
    shapes.require_comm(comm)
    comm.order.require_open("Buffer")
    return agree(comm, given, *arguments)


def make_backend(comm: Communicator, given: Shape, agreed: Agreed, num_sms: int, router: Any) -> Backend:
    """Make a named Backend without memory."""
    growth = Growth(
        tokens=agreed.shape.max_tokens is None,
        arena=given.arena_bytes is None and not agreed.recorded and router is None and comm.gpu is None,
    )
    memory = BufferMemory(
        comm,
        agreed.shape,
        growth,
        num_sms=num_sms,
        check=agreed.check,
        decode_max_tokens=agreed.decode_max_tokens,
    )
    backend = Backend(memory, Hooks(), router)
    ops.name_backend(backend)
    return backend


def open_memory(
    backend: Backend,
    shape: Shape,
    record: Any,
    decode: bool,
    make_buffer: Callable[..., Any],
    arguments: dict[str, Any],
) -> None:
    """Make the memory of a known shape, and what depends on it. Collective.

    make_buffer is the class Buffer, and `arguments` are those of its constructor.
    """
    memory, router = backend.memory, backend.router
    comm = memory.comm
    on_gpu = comm.gpu is not None
    if shape.arena_bytes is None:
        shape = shape.but(arena_bytes=memory.growth.arena_for(comm, shape))
    backend.use(memory.make(shape, 0 if router is None else router.logical_experts))
    recorder: Any = DeviceRecorder if on_gpu else Recorder  # the last step that can fail on a single rank
    backend.recorder = comm.collective.make(
        "Buffer", lambda: None if record is None else recorder(record, memory)
    )
    backend.gpu_recorder = backend.recorder if on_gpu else None  # on the host, native code records the calls
    backend.choosing = memory.native
    if on_gpu and router is not None:
        backend.beside = make_buffer(
            host_communicator_of(comm),
            hidden=8,
            num_experts=arguments["placement"].num_experts,
            arena_bytes=1 << 16,
            **{name: arguments[name] for name in _OF_HOST_BUFFER},
        )
        backend.choosing = backend.beside.backend.memory.native
    if decode:
        memory.decode = Decode(backend)
