"""Sizes and options of a Buffer: from its arguments and its first call, agreed by all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch.compiler import is_compiling

from .arguments import describe
from .checks import require
from .env import Environment
from .errors import InvalidArgument
from .results import Handle
from .shapes import (
    MODES,
    MOST_TOKENS,
    SHAPE_NAMES,
    Shape,
    as_int,
    check_known,
    decode_tokens,
    default_channels,
)
from .tracing.recorder import check_folder

if TYPE_CHECKING:
    from .backend import Backend
    from .communicator import Communicator


class Agreed(NamedTuple):
    """Values agreed by all ranks: MOECOMM_CHECK, the known part of the Shape, decode_max_tokens, recording."""

    check: bool
    shape: Shape
    decode_max_tokens: int | None
    recorded: bool


def agree(
    comm: Communicator,
    shape: Shape,
    num_sms: Any,
    decode: Any,
    record: Any,
    placement: Any,
    replicas: Any,
    activate: Any,
    renormalize: Any,
    monitor: Any,
    decode_max_tokens: Any,
) -> Agreed:
    """Agree on the sizes and options of a Buffer. Collective.

    An invalid or different value on one rank raises an error on all ranks.

    Raises
    ------
    InvalidArgument, ConfigMismatch
    """
    rank = comm.rank

    def refuse_early(name: str, wanted: str) -> NoReturn:
        raise InvalidArgument(
            f"Buffer: {name} is given, but a part of the shape is not; expected hidden, num_experts, top_k and "
            f"max_tokens {wanted}",
            op="Buffer",
            rank=rank,
        )

    def mine() -> dict[str, Any]:
        env, whole = Environment(), shape
        for name, given in (("decode", decode), ("renormalize", renormalize)):
            if not isinstance(given, bool):
                raise InvalidArgument(
                    f"Buffer: {name} is a {type(given).__qualname__}; expected True or False",
                    op="Buffer",
                    rank=rank,
                )
        require(
            isinstance(replicas, str) and replicas in MODES,
            "Buffer",
            "replicas",
            replicas,
            "one of " + ", ".join(map(repr, MODES)),
        )
        if placement is None:
            for name, given in (("activate", activate), ("monitor", monitor)):
                require(given is None, "Buffer", name, given, "None, or a placement= beside it")
        else:  # from here on, experts are slots
            require(
                hasattr(placement, "router_type") and not isinstance(placement, type),
                "Buffer",
                "placement",
                placement,
                "a moecomm.balance.Placement",
            )
            placement.router_type.check(comm, placement, whole.num_experts, activate, monitor)
            whole = whole.but(num_experts=placement.num_slots)
        if whole.dtype is None and whole.hidden is not None:
            whole = whole.but(dtype=torch.bfloat16)
        whole = check_known(comm.size, whole, num_sms, rank)
        if record is not None:
            check_folder(record, rank, comm.size)
        if not whole.is_known:
            for name, given in (("decode", decode), ("record", record), ("placement", placement)):
                if given:
                    refuse_early(name, "beside it")
        whole = whole.but(
            channels=whole.channels
            or env.channels
            or (None if comm.device.type == "cuda" else default_channels(comm.num_nodes))
        )
        tokens = whole.max_tokens
        if tokens is not None or decode_max_tokens is not None:
            tokens = decode_tokens(decode_max_tokens, tokens or MOST_TOKENS, rank)
        how = (None, None, None) if placement is None else (placement.digest, replicas, activate)
        return whole.by_name() | dict[str, Any](
            dtype=str(whole.dtype),
            decode_max_tokens=tokens,
            decode=decode,
            MOECOMM_CHECK=env.check,
            placement=how[0],
            replicas=how[1],
            activate=how[2],
        )

    everyone, recorded = zip(
        *comm.collective.everywhere("Buffer", lambda: (mine(), record is not None)), strict=True
    )
    comm.collective.require_equal("Buffer", everyone)
    agreed = everyone[0]
    dtype = torch.bfloat16 if shape.dtype is None and shape.hidden is not None else shape.dtype
    whole = Shape(**{name: agreed[name] for name in SHAPE_NAMES} | {"dtype": dtype})
    return Agreed(agreed["MOECOMM_CHECK"], whole, agreed["decode_max_tokens"], any(recorded))


def host_communicator_of(comm: Communicator) -> Communicator:
    """Make a Communicator of the same ranks in the cpu world. Collective."""
    return type(comm)(
        comm.bootstrap.subset(range(comm.size)), ranks_per_node=comm.ranks_per_node, timeout=comm.timeout
    )


def open_by_call(backend: Backend, op: str, x: Any, topk_ids: Any, num_experts: Any, handle: Any) -> None:
    """Make the memory in the first call, which determines the shape. Collective.

    An error on one rank is raised on all ranks.

    Raises
    ------
    InvalidArgument, ConfigMismatch
    """
    memory, checks = backend.memory, backend.checks
    comm, growth = memory.comm, memory.growth
    if is_compiling():
        checks.refuse(
            op,
            "the shape of this buffer is not known yet; expected one call before tracing, or a Buffer with a given "
            "shape",
        )

    def said_by_x() -> tuple[Shape, int]:
        rows, scales = checks.as_rows(op, x)
        ids = checks.as_tensor(op, "topk_ids", topk_ids)
        return _first_shape(backend, op, rows, scales, ids, num_experts), rows.shape[0]

    def mine() -> Any:
        if handle is not None or x is None:
            _check_first_handle(backend, op, handle)
            return None
        shape, tokens = said_by_x()
        return shape.but(dtype=str(shape.dtype)).by_name() | {"max_tokens": None}, tokens

    said = comm.collective.everywhere(op, mine)
    if said[comm.rank] is None:
        backend.use(handle.owner.memory.windows)
        return
    comm.collective.require_equal(op, [shape for shape, _ in said])
    shape, _ = said_by_x()
    if growth.tokens:
        shape = shape.but(max_tokens=growth.tokens_for(max(tokens for _, tokens in said)))
    if shape.arena_bytes is None:
        shape = shape.but(arena_bytes=growth.arena_for(comm, shape))
    backend.use(memory.make(shape))


def _check_first_handle(backend: Backend, op: str, handle: Any) -> None:
    """Check a handle in the first call, which determines the shape."""
    memory, checks = backend.memory, backend.checks
    if not isinstance(handle, Handle):
        checks.refuse(op, f"handle is a {type(handle).__qualname__}; expected the handle of a dispatch")
    other = handle.owner.memory
    same = all(
        was is None or was == now for was, now in zip(memory.given[:3], other.sizes()[:3], strict=True)
    )
    if other.comm is not memory.comm or not same:
        checks.refuse(
            op,
            "handle belongs to a buffer of another communicator or shape; expected a handle of a buffer with this "
            "communicator and shape",
        )


def require_num_experts(backend: Backend, op: str, num_experts: Any) -> None:
    """Check num_experts in a call of a Buffer that has its shape.

    With a placement, ids are those of logical experts, and so is their number. A Buffer that was made without one has
    one when its world has lost a rank.

    Raises
    ------
    InvalidArgument
    """
    if num_experts is None:
        return
    slots = backend.memory.num_experts
    experts = slots if backend.router is None else backend.router.placement.num_experts
    if as_int(num_experts) not in (experts, slots):
        backend.checks.refuse(op, f"num_experts is {num_experts!r}; expected {experts}, as in the Buffer")


def _first_shape(backend: Backend, op: str, x: Any, scales: Any, topk_ids: Any, num_experts: Any) -> Shape:
    """Return the Shape of the first call, if this rank's arguments are valid."""
    given, checks, comm = backend.memory.given, backend.checks, backend.memory.comm
    for name, t in (("x", x), ("topk_ids", topk_ids)):
        if t is None or t.dim() != 2:
            what = "None" if t is None else describe(t)
            checks.refuse(
                op,
                f"{name} is {what}; expected [T, {'hidden' if name == 'x' else 'top_k'}] in the first call of this "
                "Buffer",
            )
    if given.num_experts is None and num_experts is None:
        checks.refuse(
            op, "num_experts is None; expected it in the first call of a Buffer that was made without it"
        )
    said = Shape(
        x.shape[1],
        given.num_experts if num_experts is None else as_int(num_experts),
        topk_ids.shape[1],
        given.max_tokens,
        torch.bfloat16 if scales is not None else x.dtype,
        given.channels,
        given.arena_bytes,
    )
    for name, was, now in zip(SHAPE_NAMES, given, said, strict=True):
        if was is not None and was != now and (name != "dtype" or scales is None):
            checks.refuse(op, f"{name} is {now} in this call; expected {was}, as in the Buffer")
    if scales is not None and given.dtype is not None:
        said = said.but(dtype=given.dtype)
    return check_known(comm.size, said, backend.memory.num_sms, comm.rank)
