"""Typed errors. Each names the operation, phase, rank, suspected peer, and the expected and found values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class MoecommError(RuntimeError):
    """Base class of all errors of moecomm.

    Attributes
    ----------
    op, phase : str or None
        The operation, and the phase in which it failed.
    rank : int or None
        This rank.
    peer : int or None
        The suspected rank.
    expected, got
        Expected and found values, such as those of a counter.
    reporter : int or None
        The rank that detected the failure, if it is another one.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        phase: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
        expected: Any = None,
        got: Any = None,
        reporter: int | None = None,
    ) -> None:
        super().__init__(message)
        self.op, self.phase, self.rank = op, phase, rank
        self.peer, self.expected, self.got, self.reporter = peer, expected, got, reporter


class InvalidArgument(MoecommError, ValueError):
    """An argument is wrong. Nothing was moved, and the object remains usable."""


class PeerTimeout(MoecommError):
    """A peer did not do its part before the deadline. The communicator cannot be used any more.

    If this rank itself was late, for example because it was stopped, .peer is this rank and .reporter is a rank that
    ended the call without it.
    """


class PeerLost(MoecommError):
    """The process or the link of a peer is gone. The communicator cannot be used any more."""


class NoMajority(MoecommError):
    """Half of the ranks or more cannot be reached but may be alive. Continuing could split the world in two."""


class Excluded(MoecommError):
    """The other ranks continue without this one, because some of them could not reach it."""


class StepInterrupted(MoecommError):
    """A rank was lost during a step. The step is incomplete. The communicator continues without the rank.

    Attributes
    ----------
    verdict : moecomm.elastic.Verdict
        The agreement of the survivors.
    """

    def __init__(self, message: str, *, verdict: Any = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.verdict = verdict


class CapacityExceeded(MoecommError):
    """Rows do not fit into the arena or the given capacity. Raised on all ranks. The Buffer remains usable."""


class ConfigMismatch(MoecommError):
    """Ranks have different values of an argument that must be equal on all ranks."""


class CorruptRow(MoecommError):
    """MOECOMM_CHECK=1 found a row that differs from what its source sent. The communicator cannot be used any more.

    Attributes
    ----------
    source : int
        The rank that sent the row. Equal to peer.
    destination : int
        The rank that found the error.
    token : int
        In dispatch, the token at the source. In combine, the token at the rank that gets the sum.
    """

    source = destination = token = None


class RecordingIncomplete(UserWarning):
    """A recording ends early, for example because the disk is full. Given once per Buffer. The Buffer keeps working."""


def raise_failure(
    failure: Any, *, op: str, rank: int | None, describe_capacity: Callable[[Any], str] | None = None
) -> NoReturn:
    """Raise the error of a native failure.

    Raises
    ------
    MoecommError
        Always. The subclass depends on failure.code.
    """
    f = failure
    reporter = f.reporter if f.reporter >= 0 else None
    fields = dict(
        op=op,
        phase=f.phase,
        rank=rank,
        peer=f.peer if f.peer >= 0 else None,
        expected=f.expected,
        got=f.got,
        reporter=reporter,
    )
    where = f"{op} on rank {rank}, phase {f.phase}"
    if f.code == "invalid":
        fields["expected"] = fields["peer"] = None
        if f.detail == 3:
            raise InvalidArgument(
                f"decode_combine: topk_ids of token {f.expected} differ from those of decode_dispatch; "
                "expected the same",
                **fields,
            )
        what = (
            f"expert id {f.got if f.got < 2**63 else f.got - 2**64} is out of range"
            if f.detail == 1
            else f"expert id {f.got} is picked twice"
        )
        raise InvalidArgument(
            f"topk_ids: {what} in token {f.expected}; expected distinct ids in [0, num_experts), or -1",
            **fields,
        )
    if f.code == "capacity":
        hint = describe_capacity(f) if describe_capacity else ""
        raise CapacityExceeded(
            f"{where}: rank {f.peer} needs {f.expected} {'rows' if f.detail == 1 else 'bytes'}, but only "
            f"{f.got} are available. {hint}",
            **fields,
        )
    if f.code == "refused":
        _raise_refused(f, where, fields)
    if f.code == "out_of_step":
        _raise_out_of_step(f, where, fields)
    if f.code == "mismatch" and op == "combine":
        raise ConfigMismatch(
            f"{where}: rank {f.peer} and its peers differ in return_weights, or in combine and combine_slots; "
            "expected the same call with the same return_weights on all ranks",
            **fields,
        )
    if f.code == "mismatch":
        raise ConfigMismatch(
            f"{where}: rank {f.peer} called with another layout, expert_alignment, capacity, dtype, quantization, "
            f"handle reuse, placement or layer than its peers; expected the same on all ranks",
            **fields,
        )
    reported = "" if reporter is None else f" (reported by rank {reporter})"
    if f.code == "corrupt":
        _raise_corrupt(f, where, rank if reporter is None else reporter, reported, fields)
    if f.peer == rank and f.code == "timeout" and f.detail:
        ended = "another rank has" if reporter is None else f"rank {reporter} has"
        raise PeerTimeout(
            f"{where}: this rank made no progress for {f.detail / 1000:.1f} s (it was stopped, or busy elsewhere), and "
            f"{ended} ended the call without it; use a longer timeout, or keep the rank running",
            **fields,
        )
    who = f"rank {f.peer}" if f.peer >= 0 else "a rank"
    seen = f"{reported}; expected counter {f.expected}, got {f.got}"
    if f.code == "lost":
        raise PeerLost(f"{where}: {who} is gone{seen}", **fields)
    raise PeerTimeout(f"{where}: timed out waiting for {who}{seen}", **fields)


def _raise_corrupt(f: Any, where: Any, destination: Any, reported: Any, fields: Any) -> NoReturn:
    row = f"the row of source rank {f.peer}, token {f.detail}, for rank {destination}"
    if reported:
        what = "is corrupt"
    elif f.phase == "counts":
        what = (
            f"is in the wrong position: its source announced {f.expected} rows, and {f.got} rows precede it"
        )
    else:
        what = f"is corrupt or stale: expected checksum {f.expected:#x}, got {f.got:#x}"
    error = CorruptRow(f"{where}: {row} {what}{reported}", **fields)
    error.source, error.destination, error.token = f.peer, destination, f.detail
    raise error


# In the order of Why in csrc/base/types.hpp.
_WHY = (
    "",
    "its arguments are wrong",
    "its topk_ids are wrong",
    "an error was raised before its call began",
    "its memory is too small",
)


def _raise_refused(failure: Any, where: Any, fields: Any) -> NoReturn:
    fields["expected"] = fields["got"] = None
    why = _WHY[failure.detail] if 0 < failure.detail < len(_WHY) else "for an unknown reason"
    raise InvalidArgument(
        f"{where}: rank {failure.peer} refused its part in this call: {why}. Nothing was delivered to any rank; "
        f"expected valid arguments on all ranks (see the error of rank {failure.peer})",
        **fields,
    )


# In the order of Verb in csrc/base/wire.hpp.
_VERBS = (
    "dispatch",
    "decode_dispatch's choice of replicas",
    "combine",
    "decode_dispatch",
    "decode_combine",
    "multicast",
    "reduce",
)
_DIFFERS_LATE, _REFUSED_LATE = 13, 14


def _called(verb: int) -> str:
    return _VERBS[verb] if verb < len(_VERBS) else "call"


def _raise_out_of_step(failure: Any, where: Any, fields: Any) -> NoReturn:
    own, theirs = failure.detail & 15, failure.detail >> 4 & 15
    if theirs == _REFUSED_LATE:
        raise ConfigMismatch(
            f"{where}: rank {failure.peer} refused its part in a {_called(own)}, for which no host waits: the ranks "
            "have gone on, each as far as it did, and the communicator cannot be used any more",
            **fields,
        )
    if theirs == _DIFFERS_LATE:
        differs = (
            "and its peers differ in whether values return to their picks' slots; expected combine on all "
            "ranks, with the same return_weights, or combine_slots on all"
            if own == _VERBS.index("combine")
            else "differs from its peers in layout, capacity, dtype, quantization, wire, use of topk_weights, or "
            "handle reuse; expected the same on all ranks"
        )
        raise ConfigMismatch(
            f"{where}: rank {failure.peer} {differs}. No host waits for a {_called(own)}, so the ranks have gone on, "
            "and the communicator cannot be used any more",
            **fields,
        )
    who = "this rank" if failure.reporter < 0 else f"rank {failure.reporter}"
    calls = f"calls {_VERBS[theirs]}" if theirs < len(_VERBS) else "makes another call"
    raise ConfigMismatch(
        f"{where}: rank {failure.peer} {calls} while {who} calls "
        f"{_VERBS[own] if own < len(_VERBS) else 'another verb'}; expected the same calls in the same order on all "
        "ranks. The communicator cannot be used any more",
        **fields,
    )
