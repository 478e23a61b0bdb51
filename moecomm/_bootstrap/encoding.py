"""How ranks write the values that they exchange while objects are made: JSON, with bytes as base64. Nothing that is read is executed."""

from __future__ import annotations

import base64
import binascii
import json

from ..errors import InvalidArgument, MoecommError

_BYTES = (
    "base64"  # the one key of a dictionary that stands for bytes; dictionaries of values are written as pairs
)
_DICT = "pairs"
_DEEPEST = 32


def _to_json(value, depth=0):
    if depth > _DEEPEST:
        raise TypeError("it is nested too deeply")
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        return [_to_json(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {_DICT: [[_to_json(k, depth + 1), _to_json(v, depth + 1)] for k, v in value.items()]}
    raise TypeError(
        f"a {type(value).__qualname__} is none of None, bool, int, float, str, bytes, list, tuple and dict"
    )


def _from_json(value):
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == _BYTES:
        return base64.b64decode(inner, validate=True)
    if kind == _DICT:
        return {_from_json(k): _from_json(v) for k, v in inner}
    raise ValueError(f"unknown tag {kind!r}")


def encode(value):
    """The bytes of a value. Tuples arrive as lists.

    Raises
    ------
    InvalidArgument
        It holds something that cannot be exchanged.
    """
    try:
        return json.dumps(_to_json(value), separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"a {type(value).__qualname__} cannot be sent to the other ranks: {error}", op="exchange"
        ) from error


def decode(data):
    """The value of encode's bytes.

    Raises
    ------
    MoecommError
        They are no such bytes.
    """
    try:
        return _from_json(json.loads(bytes(data).decode("utf-8", "surrogatepass")))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
        raise MoecommError(
            f"a peer sent {len(data)} bytes that are no value of moecomm's ({error}); do all ranks run the same version?",
            op="exchange",
            phase="connect",
        ) from error
