"""The messages of the bootstrap: encoding, and invalid messages."""

import pytest
import torch

import moecomm
from moecomm.encoding import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -7,
        1 << 80,
        0.1,
        float("inf"),
        "\u2713 \ud800",
        b"\0\xff",
        [1, [2.5]],
        {},
        {"a": None, 3: [b"x"], None: {"base64": "no"}},
    ],
)
def test_encoding(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize("value", [object(), {"a": lambda: 0}, torch.ones(1), {1, 2}])
def test_what_cannot_be_sent(value):
    with pytest.raises(moecomm.InvalidArgument, match="cannot be sent to the other ranks"):
        encode(value)
    nested = []
    nested.append(nested)
    with pytest.raises(moecomm.InvalidArgument, match="nested more than 32 deep"):
        encode(nested)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04N.",
        b"{",
        b'{"base64":"?"}',
        b'{"base64":3}',
        b'{"pairs":[[1]]}',
        b'{"pairs":[[[],1]]}',
        b'{"a":1,"b":2}',
        b"{}",
        b'{"what":1}',
        b"[" * 5000,
    ],
)
def test_what_no_peer_sends(data):
    with pytest.raises(moecomm.MoecommError, match="not an encoded value"):
        decode(data)
