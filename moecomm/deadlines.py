"""Timeouts of waits."""

from __future__ import annotations

import numbers
from typing import Any

from .env import LONGEST_TIMEOUT, Environment
from .errors import InvalidArgument

_USUAL = 120.0  # seconds; for the round that reports an invalid MOECOMM_TIMEOUT


def seconds_of(timeout: Any, op: str) -> float:
    """Return the timeout in seconds. None: MOECOMM_TIMEOUT, else 120.

    Raises
    ------
    InvalidArgument
        The timeout, or the variable, is not a number of seconds.
    """
    if timeout is None:
        return Environment().timeout
    if not isinstance(timeout, numbers.Real) or not 0 < timeout <= LONGEST_TIMEOUT:  # type: ignore[operator]
        raise InvalidArgument(
            f"timeout is {timeout!r}; expected seconds > 0, at most {LONGEST_TIMEOUT}",
            op=op,
        )
    return float(timeout)


def patience_of(patience: Any, device: Any, threads: bool) -> str:
    """What the timeout of a Communicator counts from.

    Raises
    ------
    InvalidArgument
        It is neither "deadline" nor "alive", or "alive" where nothing tells that a peer lives.
    """
    if patience not in ("deadline", "alive"):
        raise InvalidArgument(
            f'patience: got {patience!r}; expected "deadline" or "alive"', op="Communicator"
        )
    if patience == "alive" and (threads or device.type != "cpu"):
        who = "rank threads, which live and die together" if threads else f"ranks on {device.type}"
        raise InvalidArgument(
            f"patience: got 'alive' for {who}; expected it for processes without GPUs", op="Communicator"
        )
    return str(patience)


def require_one_host(patience: str, hosts: Any) -> None:
    """Refuse ranks that see no sign of life of others. hosts: the identity of every rank's.

    Raises
    ------
    InvalidArgument
        patience is "alive", and the ranks are on several hosts.
    """
    if patience == "alive" and len(set(hosts)) > 1:
        raise InvalidArgument(
            f"patience: got 'alive' for ranks on {len(set(hosts))} hosts; expected one host, whose processes see "
            "signs of life",
            op="Communicator",
        )


def to_meet(timeout: Any) -> float:
    """Like seconds_of, but return a default if it is invalid: ranks must still meet to exchange the error."""
    try:
        return seconds_of(timeout, "Communicator")
    except InvalidArgument:
        return _USUAL
