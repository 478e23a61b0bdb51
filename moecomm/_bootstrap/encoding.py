"""The encoding of values that ranks exchange in constructors: JSON, with bytes as base64. Decoding executes nothing."""

from __future__ import annotations

from typing import Any

import base64
import binascii
import json

from ..errors import InvalidArgument, MoecommError

# The only key of a JSON object: it stands for bytes, or for a dictionary as a list of pairs.
_BYTES = "base64"
_DICT = "pairs"
_DEEPEST = 32


def _to_json(value: Any, depth: Any = 0) -> Any:
    if depth > _DEEPEST:
        raise TypeError(f"it is nested more than {_DEEPEST} deep")
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
        f"it has a {type(value).__qualname__}; expected None, bool, int, float, str, bytes, list, tuple or dict"
    )


def _from_json(value: Any) -> Any:
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


def encode(value: Any) -> Any:
    """Return a value as bytes. decode returns tuples as lists.

    Raises
    ------
    InvalidArgument
        The value has a part of another type.
    """
    try:
        return json.dumps(_to_json(value), separators=(",", ":")).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"a {type(value).__qualname__} cannot be sent to the other ranks: {error}", op="exchange"
        ) from error


def decode(data: Any) -> Any:
    """Return the value that encode has turned into these bytes.

    Raises
    ------
    MoecommError
        The bytes are not those of encode.
    """
    try:
        return _from_json(json.loads(bytes(data).decode("utf-8", "surrogatepass")))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
        raise MoecommError(
            f"a peer sent {len(data)} bytes that are not an encoded value ({error}); expected the same version of "
            "moecomm on all ranks",
            op="exchange",
            phase="connect",
        ) from error
