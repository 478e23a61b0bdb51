"""Arguments of constructors and of run_local, the environment, and objects that cannot be copied or pickled."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from worlds import assert_same

import moecomm

H, K, E = 64, 2, 8


@pytest.mark.parametrize(
    "name,value,expectation",
    [
        ("hidden", 12, "a multiple of 16 bytes per row"),
        ("hidden", 0, "16 bytes per row"),
        ("num_experts", 7, "a multiple of the 2 ranks"),
        ("top_k", 33, r"1\.\."),
        ("top_k", 0, r"1\.\."),
        ("max_tokens", 0, r"1\.\.2"),
        ("dtype", torch.int8, "one of torch.bfloat16"),
        ("channels", 1025, r"1\.\.1024"),
        ("num_sms", 3, "an even int"),
        ("num_sms", 0, "an even int >= 2"),
        ("arena_bytes", -1, r"bytes, 1\.\."),
        ("arena_bytes", 1.5, r"bytes, 1\.\."),
        ("hidden", 64.0, "16 bytes per row"),
    ],
)
def test_buffer_arguments(name, value, expectation):
    def main(comm):
        with pytest.raises(
            moecomm.InvalidArgument, match=f"Buffer: {name} is {value}.*; expected .*{expectation}"
        ):
            moecomm.Buffer(comm, **{**dict(hidden=H, num_experts=64, top_k=K, max_tokens=8), name: value})
        with pytest.raises(moecomm.InvalidArgument, match=name):
            moecomm.Buffer.size_hint(
                comm, **{**dict(hidden=H, num_experts=64, top_k=K, max_tokens=8), name: value}
            )

    moecomm.run_local(main, 2)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(group="world"), "group is a str; expected a torch ProcessGroup"),
        (dict(timeout=0), "timeout is 0; expected seconds > 0"),
        (dict(timeout=float("inf")), "timeout is inf; expected seconds > 0"),
        (dict(timeout=float("nan")), "timeout is nan"),
        (dict(timeout="5"), "timeout is '5'"),
        (dict(ranks_per_node=2), "ranks_per_node is 2; expected a divisor of the 1 ranks"),
        (dict(ranks_per_node="all"), "ranks_per_node is 'all'"),
        (dict(device="mps"), "device is mps"),
    ],
)
def test_communicator_arguments(options, message):
    with pytest.raises(moecomm.InvalidArgument, match=message):
        moecomm.Communicator(**options)


@pytest.mark.parametrize(
    "name,value,expectation",
    [
        ("CHANNELS", "many", "channels of a Buffer"),
        ("CHANNELS", "-1", "channels of a Buffer"),
        ("RAIL", "foo", "auto"),
        ("CHECK", "maybe", "1: every row has a checksum"),
        ("POPULATE_BYTES", "1GB", "bytes of arenas"),
        ("ISA", "sse9", "avx512 | avx2 | base"),
    ],
)
def test_environment(monkeypatch, name, value, expectation):
    monkeypatch.setenv(f"MOECOMM_{name}", value)
    with pytest.raises(
        moecomm.InvalidArgument, match=f"MOECOMM_{name} is '{value}'; expected .*{re.escape(expectation)}"
    ):
        moecomm.Communicator()


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(size=0), "size is 0"),
        (dict(size="2"), "size is '2'"),
        (dict(fn=None), "fn is None; expected a function"),
        (dict(timeout=-1), "timeout is -1"),
        (dict(timeout="x"), "timeout is 'x'"),
        (dict(device="toaster"), "device is 'toaster'; expected cpu or cuda"),
        (dict(ranks_per_node=3), "ranks_per_node is 3"),
    ],
)
def test_run_local_arguments(options, message):
    with pytest.raises(moecomm.InvalidArgument, match=message):
        moecomm.run_local(**{**dict(fn=lambda comm: None, size=4), **options})


def test_integers_of_numpy():
    assert moecomm.run_local(lambda comm: comm.num_nodes, np.int64(4), ranks_per_node=np.int32(2)) == [2] * 4
    shape = dict(
        hidden=np.int64(H),
        num_experts=np.int32(E),
        top_k=np.int64(K),
        max_tokens=np.uint8(8),
        arena_bytes=np.int64(1 << 20),
    )
    comm = moecomm.Communicator()
    assert moecomm.Buffer(comm, **shape).num_bytes == moecomm.Buffer.size_hint(comm, **shape)


def test_copies_share_and_nothing_is_pickled():
    """A deep copy of a layer (for averaged weights, for example) keeps its Buffer."""
    comm = moecomm.Communicator()
    layer = moecomm.nn.MoE(
        H, 8, E, K, 1, moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8)
    )
    twin = copy.deepcopy(layer)
    assert (
        twin.buffer is layer.buffer
        and twin.experts.down is not layer.experts.down
        and copy.copy(comm) is comm
    )
    x = torch.randn(4, H).bfloat16()
    with torch.no_grad():
        assert_same(twin(x), layer(x), "y")
    with pytest.raises(TypeError, match=r"a Buffer belongs to its process.*state_dict"):
        pickle.dumps(layer)
