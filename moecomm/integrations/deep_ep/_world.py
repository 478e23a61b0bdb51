"""World: shared by the buffers of one process group. It has a Communicator, core Buffers by shape, and agreement."""

from __future__ import annotations

from typing import Any

import atexit

import torch

from ...buffer import Buffer as Core
from ...communicator import Communicator
from ...errors import CapacityExceeded, ConfigMismatch, InvalidArgument
from ._arrival import counted
from .errors import refuse

_options = dict(ranks_per_node=None, device=None, timeout=None, patience=None)
_worlds: dict[Any, Any] = {}  # by id of the group; the World keeps the group alive
_NUMBERS, _TEXT = 24, 40  # int64 words of an agreement: numbers, and the text of a refusal
_DISPATCHES = 4  # results that fit into the initial arena; it grows


def configure(**options: Any) -> None:
    """Set options of the Communicators that are made from now on: ranks_per_node, device, timeout, patience.

    None means the default of moecomm.Communicator. The default device is the current GPU if torch has one, else the
    CPU.

    Raises
    ------
    InvalidArgument
        The option does not exist.
    """
    for name in options:
        if name not in _options:
            refuse(
                "configure",
                f"there is no option {name}; expected ranks_per_node, device, timeout or patience",
            )
    _options.update(options)


def shutdown() -> None:
    """Release all communicators and windows of the drop-in in this process.

    Local. Its Buffers cannot be used afterwards.
    """
    for world in list(_worlds.values()):
        world.close()
    _worlds.clear()


atexit.register(shutdown)


def world_of(group: Any) -> Any:
    """Return the World of a torch ProcessGroup, a one-dimensional DeviceMesh, an mpi4py Comm or a Communicator.

    The first call for a group is collective.
    """
    for key, world in list(_worlds.items()):
        if not world.is_alive():  # the process group was destroyed or the Communicator closed
            world.close()
            del _worlds[key]
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        group = group.get_group()
    if id(group) not in _worlds:
        _worlds[id(group)] = World(group)
    return _worlds[id(group)]


class World:
    """The ranks of one group. All ranks must make its calls in the same order."""

    def __init__(self, group: Any) -> None:
        self.group, self._owned = group, not isinstance(group, Communicator)
        if self._owned:
            device = _options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
            given: dict[str, Any] = {name: value for name, value in _options.items() if value is not None}
            group = Communicator(group, **{**given, "device": device})
        self.comm = group
        self.rank, self.size, self.num_nodes = group.rank, group.size, group.num_nodes
        self._cores: dict[Any, Any] = {}
        self._calls, self._closed = 0, False
        self.last: dict[Any, Any] = {}  # core Buffers that were used last, by whether for decode

    def is_alive(self) -> bool:
        """Whether the group still exists."""
        if self._closed:
            return False
        if isinstance(self.group, torch.distributed.ProcessGroup):
            try:
                torch.distributed.get_process_group_ranks(self.group)
            except (KeyError, ValueError, RuntimeError):
                return False
        return not self.comm.order.closed

    def close(self) -> None:
        """Release the windows. Results that view them stay valid. Local."""
        if self._closed:
            return
        self._closed = True
        for core in self._cores.values():
            core.close()
        self._cores.clear()
        if self._owned:
            self.comm.close()

    def require_open(self, op: str) -> None:
        """Refuse a call after shutdown().

        Raises
        ------
        InvalidArgument
            shutdown() has been called.
        """
        if self._closed:
            refuse(op, "the drop-in was shut down; make a new Buffer", self.rank)

    # -- core Buffers -----------------------------------------------------------------------------

    def core(
        self,
        hidden: int,
        experts: Any,
        top_k: int,
        dtype: torch.dtype,
        tokens: Any,
        *,
        decode: Any = False,
        num_sms: int = 20,
        name: str | None = None,
    ) -> Any:
        """Return the core Buffer of a shape for at least `tokens` tokens (for decode, exactly `tokens`).

        All ranks call it with equal arguments, so either all ranks make the Buffer, which is collective, or none. An
        earlier, smaller Buffer stays alive as long as handles refer to it.
        """
        key = (hidden, experts, top_k, dtype, tokens if decode else None, name)
        core = self._cores.get(key)
        if core is None or core.max_tokens < tokens:
            if not decode:
                tokens = max(1 << (tokens - 1).bit_length(), 16) if tokens > 1 else 16
            core = self._make(key, tokens, None, num_sms)
        return core

    def _make(self, key: Any, tokens: Any, arena: Any, num_sms: int) -> Any:
        hidden, experts, top_k, dtype, decode, _ = key
        shape = dict(hidden=hidden, num_experts=experts, max_tokens=tokens, dtype=dtype)
        if arena is None:
            # top_k=1: one row per token and rank.
            arena = Core.arena_hint(self.comm, **shape, top_k=1, dispatches=_DISPATCHES)
        core = Core(
            self.comm,
            **shape,
            top_k=top_k,
            arena_bytes=1 << 16 if decode else arena,
            decode=decode is not None,
            num_sms=num_sms,
        )
        self._cores[key] = core
        return core

    @property
    def masked(self) -> Any:
        """Ranks that the low-latency verbs do without."""
        return sorted({rank for core in self._cores.values() for rank in core.masked})

    def mask(self, op: str, rank: int) -> None:
        """Mask a dead rank in every core Buffer of the low-latency verbs. Collective over the ranks that are left.

        Raises
        ------
        InvalidArgument
            There is none yet, or as Core.mask.
        """
        cores = [core for key, core in self._cores.items() if key[4] is not None]
        if not cores:
            refuse(
                op,
                f"rank {rank} is to be masked, and there was no low_latency_dispatch; expected a group without it",
                self.rank,
            )
        for core in cores:
            if rank not in core.masked:
                core.mask([rank])

    def dispatch(self, core: Any, x: Any, ids: Any = None, weights: Any = None, **how: Any) -> Any:
        """Call core.dispatch; if results of earlier calls fill the arena, with a new core that has a larger one.

        Collective. Returns (core, Dispatched, Arrival or None). With async_op the rows are in flight.
        """
        while True:
            try:
                return core, *counted(core.dispatch(x, ids, weights, **how))
            except CapacityExceeded as error:  # raised on all ranks
                if "arena_bytes" not in str(error) or how.get("handle") is not None:
                    raise
            core = self._make(
                (core.hidden, core.num_experts, core.top_k, core.dtype, None, None),
                core.max_tokens,
                2 * core.arena_bytes,
                core.num_sms,
            )

    # -- agreement --------------------------------------------------------------------------------

    def scatter(self, values: Any) -> Any:
        """All-to-all of int64 [size, n] on the host: row r goes to rank r; row r of the result is from rank r.

        Collective. Uses a core dispatch.
        """
        if self.size == 1:
            return values
        n = values.shape[1] + values.shape[1] % 2  # a row is a multiple of 16 bytes
        core = self.core(n, self.size, 1, torch.float64, self.size, name="agree")
        rows = (
            torch.nn.functional.pad(values, (0, n - values.shape[1])).view(torch.float64).to(self.comm.device)
        )
        ids = torch.arange(self.size, dtype=torch.int64, device=self.comm.device).view(self.size, 1)
        return core.dispatch(rows, ids, layout="rank").x.cpu().view(torch.int64)[:, : values.shape[1]].clone()

    def agree(self, op: str, *, same: Any = None, most: Any = (), refusal: Any = None) -> Any:
        """Check that all ranks make the same call with the same values; return the maxima of `most` over ranks.

        Collective: one small exchange.

        Parameters
        ----------
        op : str
            Name of the call.
        same : dict of int
            Values that must be equal on all ranks.
        most : tuple of int
            Numbers of this rank whose maximum over ranks is returned.
        refusal : Exception, optional
            The error of this rank. It is raised here, and every other rank raises InvalidArgument with its text.

        Raises
        ------
        InvalidArgument
            A rank refused its arguments.
        ConfigMismatch
            Ranks make different calls, or have different values.
        """
        self._calls += 1
        same = same or {}
        mine = [self._calls, sum(op.encode()), len(str(refusal)) if refusal else 0, *same.values(), *most]
        words = torch.zeros(_NUMBERS + _TEXT, dtype=torch.int64, device="cpu")
        words[: len(mine)] = torch.tensor(mine, dtype=torch.int64, device="cpu")
        if refusal is not None:
            text = str(refusal).encode()[: 8 * _TEXT]
            words.view(torch.uint8)[8 * _NUMBERS : 8 * _NUMBERS + len(text)] = torch.frombuffer(
                bytearray(text), dtype=torch.uint8
            )
        everyone = self.scatter(words.expand(self.size, -1).contiguous())
        numbers = everyone[:, :_NUMBERS].tolist()
        self._calls = max(row[0] for row in numbers)
        for rank, row in enumerate(numbers):
            if row[:2] != mine[:2]:
                raise ConfigMismatch(
                    f"{op} on rank {self.rank}: rank {rank} makes another call (number {row[0]}, here number "
                    f"{mine[0]}); expected every rank to make the same calls in the same order",
                    op=op,
                    rank=self.rank,
                    peer=rank,
                )
        if refusal is not None:
            raise refusal
        for rank, row in enumerate(numbers):
            if row[2]:
                told = (
                    bytes(everyone[rank].view(torch.uint8)[8 * _NUMBERS :].tolist())
                    .rstrip(b"\0")
                    .decode(errors="replace")
                )
                raise InvalidArgument(
                    f"{op}: rank {rank} refused its arguments, so nothing was moved on any rank: {told}",
                    op=op,
                    rank=self.rank,
                    peer=rank,
                )
        for i, (name, value) in enumerate(same.items()):
            for rank, row in enumerate(numbers):
                if row[3 + i] != value:
                    raise ConfigMismatch(
                        f"{op} on rank {self.rank}: {name} is {value} here and {row[3 + i]} on rank {rank}; "
                        "expected the same on every rank",
                        op=op,
                        rank=self.rank,
                        peer=rank,
                        expected=value,
                        got=row[3 + i],
                    )
        first = 3 + len(same)
        return [max(row[first + i] for row in numbers) for i in range(len(most))]
