"""What the drop-in's buffers of one process group share: a Communicator, core Buffers by shape, and rounds
in which ranks agree.
"""

from __future__ import annotations

import atexit

import torch

from ...buffer import Buffer as Core
from ...communicator import Communicator
from ...errors import CapacityExceeded, ConfigMismatch, InvalidArgument
from .errors import refuse

_options = dict(ranks_per_node=None, device=None, timeout=100.0)  # seconds, as deep_ep's own
_worlds = {}  # by id of the group, which the World keeps
_NUMBERS, _TEXT = 24, 40  # int64 words of a round: what is agreed, and why a rank refuses
_DISPATCHES = 4  # results that an arena holds at first; it grows


def configure(**options):
    """How Communicators of groups that are seen for the first time from here on are made: ranks_per_node,
    device, timeout.

    None leaves it to moecomm.Communicator; without a device it is the current GPU where torch has one, else
    the CPU. The timeout is 100 seconds where it was never named.

    Raises
    ------
    InvalidArgument
        There is no such option.
    """
    for name in options:
        if name not in _options:
            refuse("configure", f"got {name}; expected ranks_per_node, device or timeout")
    _options.update(options)


def shutdown():
    """Release every communicator and window of the drop-in in this process.

    Local; its Buffers cannot be used afterwards.
    """
    for world in list(_worlds.values()):
        world.close()
    _worlds.clear()


atexit.register(shutdown)


def world_of(group):
    """The World of a torch ProcessGroup, a one-dimensional DeviceMesh, an mpi4py Comm or a Communicator.

    The first time collective.
    """
    for key, world in list(_worlds.items()):
        if not world.is_alive():  # its process group was destroyed, or its Communicator closed
            world.close()
            del _worlds[key]
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        group = group.get_group()
    if id(group) not in _worlds:
        _worlds[id(group)] = World(group)
    return _worlds[id(group)]


class World:
    """One group's ranks. Its calls are made in the same order on all of them."""

    def __init__(self, group):
        self.group, self._owned = group, not isinstance(group, Communicator)
        if self._owned:
            device = _options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
            given = {name: value for name, value in _options.items() if value is not None}
            group = Communicator(group, **{**given, "device": device})
        self.comm = group
        self.rank, self.size, self.num_nodes = group.rank, group.size, group.num_nodes
        self._cores, self._calls, self._closed = {}, 0, False

    def is_alive(self):
        """Whether the group that it was made for still exists."""
        if self._closed:
            return False
        if isinstance(self.group, torch.distributed.ProcessGroup):
            try:
                torch.distributed.get_process_group_ranks(self.group)
            except (KeyError, ValueError, RuntimeError):
                return False
        return not self.comm._closed

    def close(self):
        """Release the windows; results that view them stay valid. Local."""
        if self._closed:
            return
        self._closed = True
        for core in self._cores.values():
            core.close()
        self._cores.clear()
        if self._owned:
            self.comm.close()

    def require_open(self, op):
        """Refuse a call behind shutdown().

        Raises
        ------
        InvalidArgument
        """
        if self._closed:
            refuse(op, "the drop-in was shut down; expected a new Buffer", self.rank)

    # -- core Buffers -----------------------------------------------------------------------------

    def core(self, hidden, experts, top_k, dtype, tokens, *, decode=False, num_sms=20, name=None):
        """The core Buffer of a shape for at least `tokens` tokens, exactly `tokens` for decode. Collective
        where it is made.

        Ranks call it with equal arguments, so it is made on all of them or on none. An earlier, smaller one
        stays in the hands of handles that were made with it.
        """
        key = (hidden, experts, top_k, dtype, tokens if decode else None, name)
        core = self._cores.get(key)
        if core is None or core.max_tokens < tokens:
            if not decode:
                tokens = max(1 << (tokens - 1).bit_length(), 16) if tokens > 1 else 16
            core = self._make(key, tokens, None, num_sms)
        return core

    def _make(self, key, tokens, arena, num_sms):
        hidden, experts, top_k, dtype, decode, _ = key
        shape = dict(hidden=hidden, num_experts=experts, max_tokens=tokens, dtype=dtype)
        if arena is None:
            arena = Core.arena_hint(
                self.comm, **shape, top_k=1, dispatches=_DISPATCHES
            )  # for one row per token and rank
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

    def dispatch(self, core, x, ids=None, weights=None, **how):
        """(core, Dispatched): core.dispatch, in a larger arena where results of earlier calls fill this one.

        Collective.
        """
        while True:
            try:
                return core, core.dispatch(x, ids, weights, **how)
            except CapacityExceeded as error:  # on every rank
                if "arena_bytes" not in str(error) or how.get("handle") is not None:
                    raise
            core = self._make(
                (core.hidden, core.num_experts, core.top_k, core.dtype, None, None),
                core.max_tokens,
                2 * core.arena_bytes,
                core.num_sms,
            )

    # -- agreement --------------------------------------------------------------------------------

    def scatter(self, values):
        """int64 [size, n] on the host, row r for rank r -> int64 [size, n], row r from rank r.

        Collective, by a core dispatch.
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

    def agree(self, op, *, same=None, most=(), refusal=None):
        """The largest of each number over all ranks, where they all make this call. Collective: one small exchange.

        Parameters
        ----------
        op : str
        same : dict of int
            Must be equal on all ranks.
        most : tuple of int
        refusal : InvalidArgument, optional
            Why this rank cannot go on: raised here, and its text on every other rank.

        Raises
        ------
        InvalidArgument
            A rank refused.
        ConfigMismatch
            Ranks make different calls, or disagree.
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
                    f"{op} on rank {self.rank}: rank {rank} makes another call (its call {row[0]}, here "
                    f"call {mine[0]}); "
                    "expected every rank to make the same calls in the same order",
                    op=op,
                    rank=self.rank,
                    peer=rank,
                )
        if refusal is not None:
            raise refusal
        for rank, row in enumerate(numbers):
            if row[2]:
                text = (
                    bytes(everyone[rank].view(torch.uint8)[8 * _NUMBERS :].tolist())
                    .rstrip(b"\0")
                    .decode(errors="replace")
                )
                raise InvalidArgument(
                    f"{op}: rank {rank} refused its arguments, so nothing was moved on any rank: {text}",
                    op=op,
                    rank=self.rank,
                    peer=rank,
                )
        for i, (name, value) in enumerate(same.items()):
            for rank, row in enumerate(numbers):
                if row[3 + i] != value:
                    raise ConfigMismatch(
                        f"{op} on rank {self.rank}: {name} is {value} here and {row[3 + i]} on rank "
                        f"{rank}; expected the same on "
                        "every rank",
                        op=op,
                        rank=self.rank,
                        peer=rank,
                        expected=value,
                        got=row[3 + i],
                    )
        first = 3 + len(same)
        return [max(row[first + i] for row in numbers) for i in range(len(most))]
