"""What the decode path refuses when it is made, and the errors that its native failures stand for."""

from __future__ import annotations

from .errors import ConfigMismatch, InvalidArgument, raise_failure
from .refusals import made

_STAGES = ("over", "sent", "received", "answered", "done")
_MAX_TOKENS = 1 << 20


class DecodeFailures:
    """Raises what a native failure stands for."""

    def __init__(self, buffer):
        self._buffer, self._rank = buffer, buffer.comm.rank

    def __call__(self, failure, op):
        made(self._buffer)
        if failure.code == "invalid" and failure.detail == 3:
            raise InvalidArgument(
                f"{op}: topk_ids of token {failure.expected} differ from those that decode_dispatch sent; expected the same",
                op=op,
                rank=self._rank,
                got=failure.got,
            )
        if failure.code == "invalid" and failure.detail == 4:
            what = f"{_STAGES[failure.got]}, where it must be {_STAGES[failure.expected]}"
            raise InvalidArgument(
                f"{op}: an earlier step of this buffer is {what}; expected its hooks to be called first, and handles to stay in the graph "
                "that they were captured in",
                op=op,
                rank=self._rank,
            )
        if failure.code == "mismatch":
            raise ConfigMismatch(
                f"{op} on rank {self._rank}: rank {failure.peer} called with another dtype, quant, wire or use of topk_weights",
                op=op,
                phase=failure.phase,
                rank=self._rank,
                peer=failure.peer,
                expected=failure.expected,
                got=failure.got,
            )
        raise_failure(failure, op=op, rank=self._rank)


def check_decode_limits(size, num_experts, max_tokens, rank):
    """Refuse what the decode path cannot hold.

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
