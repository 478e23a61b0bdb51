"""Checks of the decode path's sizes, and the errors of its native failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigMismatch, InvalidArgument, raise_failure
from .refusals import made

if TYPE_CHECKING:
    from .backend import Backend

_STAGES = ("gone", "sent", "received", "answered", "done", "over")
_MAX_TOKENS = 1 << 20


class DecodeFailures:
    """Raises the errors of native failures."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._rank = backend, backend.memory.comm.rank

    def __call__(self, failure: Any, op: str) -> NoReturn:
        made(self._backend)
        if failure.code == "invalid" and failure.detail == 4:
            what = f"{_STAGES[failure.got]}, but must be {_STAGES[failure.expected]}"
            raise InvalidArgument(
                f"{op}: an earlier step of this buffer is {what}; expected calls of its hooks first, and the use of "
                "captured handles only in their graph",
                op=op,
                rank=self._rank,
            )
        if failure.code == "mismatch":
            raise ConfigMismatch(
                f"{op} on rank {self._rank}: rank {failure.peer} called with another dtype, quant, wire or use of "
                "topk_weights; expected the same on all ranks",
                op=op,
                phase=failure.phase,
                rank=self._rank,
                peer=failure.peer,
                expected=failure.expected,
                got=failure.got,
            )
        raise_failure(failure, op=op, rank=self._rank)


def check_decode_limits(size: int, num_experts: int, max_tokens: int, rank: int) -> None:
    """Refuse sizes beyond the limits of the decode path.

    Raises
    ------
    InvalidArgument
    """
    if max_tokens > _MAX_TOKENS:
        raise InvalidArgument(
            f"decode: decode_max_tokens is {max_tokens}; expected at most {_MAX_TOKENS}",
            op="decode",
            rank=rank,
        )
    if num_experts * max_tokens >= 1 << 30:
        raise InvalidArgument(
            f"decode: num_experts * decode_max_tokens is {num_experts * max_tokens}; expected less than 2**30",
            op="decode",
            rank=rank,
        )
