"""Typed errors: every one names the operation, the phase, the rank, the suspected peer, expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class MoecommError(RuntimeError):
    """Base of every error that moecomm raises about communication.

    Attributes: op, phase, rank, peer (global rank or None), expected, got, and reporter (the rank that found
    out, where it was another one); None where they do not apply.
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
    """An argument is wrong; nothing was moved and the object stays usable."""


class PeerTimeout(MoecommError):
    """A peer did not do its part before the deadline; the communicator cannot be used any more.

    Where this rank itself was the late one (it was stopped, say), .peer is its own number and .reporter a rank that ended without it.
    """


class PeerLost(MoecommError):
    """A peer's process or link is gone; the communicator cannot be used any more."""


class CapacityExceeded(MoecommError):
    """Rows do not fit the arena or the stated capacity; raised on every rank, and the buffer stays usable."""


class ConfigMismatch(MoecommError):
    """Ranks disagree about an argument that must be equal on all of them."""


class CorruptRow(MoecommError):
    """MOECOMM_CHECK=1 found a row that is not what its source sent; the communicator cannot be used any more.

    Attributes besides those of MoecommError: source (= peer), destination (the rank that found it) and token
    (of the source, in dispatch; of the rank that the sum is for, in combine).
    """

    source = destination = token = None


class RecordingIncomplete(UserWarning):
    """A recording ends early, because of a full disk for example. Warned once per Buffer; the Buffer itself is not affected."""


def raise_failure(
    failure: Any, *, op: str, rank: int | None, describe_capacity: Callable[[Any], str] | None = None
) -> NoReturn:
    """Raise the error that a native failure stands for.

    Raises
    ------
    MoecommError
        Always; the subclass follows failure.code.
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
            f"{where}: rank {f.peer} would need {f.expected} {'rows' if f.detail == 1 else 'bytes'}, "
            f"{f.got} are available. {hint}",
            **fields,
        )
    if f.code == "refused":
        _raise_refused(f, where, fields)
    if f.code == "out_of_step":
        _raise_out_of_step(f, where, fields)
    if f.code == "mismatch" and op == "combine":
        raise ConfigMismatch(
            f"{where}: rank {f.peer} wants values back in its picks' slots and other ranks do not, or the reverse; expected "
            "combine on all ranks, or combine_slots on all",
            **fields,
        )
    if f.code == "mismatch":
        raise ConfigMismatch(
            f"{where}: rank {f.peer} called with another layout, expert_alignment, capacity, dtype, quantization, "
            f"handle reuse, placement or layer than its peers",
            **fields,
        )
    reported = "" if reporter is None else f" (reported by rank {reporter})"
    if f.code == "corrupt":
        _raise_corrupt(f, where, rank if reporter is None else reporter, reported, fields)
    if f.peer == rank and f.code == "timeout" and f.detail:
        ended = "another rank has" if reporter is None else f"rank {reporter} has"
        raise PeerTimeout(
            f"{where}: this rank did not look at its peers for {f.detail / 1000:.1f} s (it was stopped, or busy elsewhere), and {ended} ended "
            "the call without it; expected a longer timeout, or a rank that is not stopped",
            **fields,
        )
    who = f"rank {f.peer}" if f.peer >= 0 else "a rank"
    seen = f"{reported}; expected counter {f.expected}, got {f.got}"
    if f.code == "lost":
        raise PeerLost(f"{where}: {who} is gone{seen}", **fields)
    raise PeerTimeout(f"{where}: timed out waiting for {who}{seen}", **fields)


def _raise_corrupt(f: Any, where: Any, destination: Any, reported: Any, fields: Any) -> NoReturn:
    row = f"the row of source rank {f.peer}, token {f.detail}, destined for rank {destination}"
    if reported:
        what = "arrived wrong"
    elif f.phase == "counts":
        what = f"is not where it belongs: {f.expected} rows of that source were announced here, {f.got} came before this place"
    else:
        what = f"arrived wrong or stale: checksum {f.expected:#x} was sent, {f.got:#x} was read"
    error = CorruptRow(f"{where}: {row} {what}{reported}", **fields)
    error.source, error.destination, error.token = f.peer, destination, f.detail
    raise error


# By the numbers of Why, as a peer reads them.
_WHY = ("", "its arguments are wrong", "its topk_ids are wrong", "an error ended its call before it began")


def _raise_refused(failure: Any, where: Any, fields: Any) -> NoReturn:
    fields["expected"] = fields["got"] = None
    why = _WHY[failure.detail] if 0 < failure.detail < len(_WHY) else "it does not say why"
    raise InvalidArgument(
        f"{where}: rank {failure.peer} refused its part in this call: {why}. Nothing was delivered to any rank; expected valid "
        f"arguments on all of them (rank {failure.peer}'s own error says which is not)",
        **fields,
    )


# By the numbers of Verb in csrc/base/wire.hpp.
_VERBS = ("dispatch", "decode_dispatch's choice of replicas", "combine", "decode_dispatch", "decode_combine")
_REFUSED_LATE = 14


def _raise_out_of_step(failure: Any, where: Any, fields: Any) -> NoReturn:
    own, theirs = failure.detail & 15, failure.detail >> 4 & 15
    if theirs == _REFUSED_LATE:
        raise ConfigMismatch(
            f"{where}: rank {failure.peer} refused its part in an earlier call, for which no host waited: the ranks are not in step any more, "
            "and the communicator cannot be used",
            **fields,
        )
    who = "this rank" if failure.reporter < 0 else f"rank {failure.reporter}"
    calls = f"calls {_VERBS[theirs]}" if theirs < len(_VERBS) else "makes another call"
    raise ConfigMismatch(
        f"{where}: rank {failure.peer} {calls} where {who} calls {_VERBS[own] if own < len(_VERBS) else 'another verb'}; expected the same calls "
        "in the same order on all ranks. The communicator cannot be used any more",
        **fields,
    )
