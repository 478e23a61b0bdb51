"""Ranks that disagree all raise ConfigMismatch, which names the argument and the ranks."""

import time

import pytest
import torch

import moecomm

pytestmark = pytest.mark.mpi(min_size=2)
GOOD = dict(hidden=64, num_experts=24, top_k=2, max_tokens=8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name,value",
    [
        ("hidden", 128),
        ("num_experts", 48),
        ("top_k", 3),
        ("max_tokens", 9),
        ("dtype", torch.float16),
        ("channels", 5),
        ("arena_bytes", 1 << 20),
    ],
)
def test_buffer_arguments(world, name, value):
    with moecomm.Communicator(world, timeout=20) as comm:
        last = comm.size - 1
        with pytest.raises(moecomm.ConfigMismatch) as raised:
            moecomm.Buffer(comm, **{**GOOD, **({name: value} if comm.rank == last else {})})
        text = str(raised.value)
        assert name in text and "rank 0" in text and f"rank {last}" in text and str(value) in text, text
        assert raised.value.rank == comm.rank and raised.value.peer == last
        moecomm.Buffer(comm, **GOOD).close()  # the communicator still works


def refused_everywhere(world, make, *patterns):
    """Check that make(True on the wrong rank) raises InvalidArgument on all ranks at once, and names that rank."""
    last, began = world.size - 1, time.monotonic()
    with pytest.raises(moecomm.InvalidArgument) as raised:
        make(world.rank == last)
    assert time.monotonic() - began < 10
    for pattern in (*patterns, f"rank {last}"):
        assert pattern in str(raised.value), str(raised.value)
    assert raised.value.rank == world.rank and raised.value.peer == last


@pytest.mark.parametrize(
    "name,value",
    [
        ("hidden", 12),
        ("num_experts", 7),
        ("top_k", 0),
        ("dtype", torch.int8),
        ("channels", 0),
        ("record", "/proc/here"),
        ("placement", "none"),
    ],
)
def test_wrong_arguments_of_one_rank(world, name, value):
    """One rank alone has an invalid value, which no buffer can have."""
    with moecomm.Communicator(world, timeout=20) as comm:
        refused_everywhere(
            world,
            lambda wrong: moecomm.Buffer(comm, **{**GOOD, **({name: value} if wrong else {})}),
            name,
            str(value),
        )
        moecomm.Buffer(comm, **GOOD).close()


@pytest.mark.parametrize("options", [dict(timeout=0), dict(device="tpu"), dict(device="cuda:900")], ids=str)
def test_wrong_arguments_of_one_communicator(world, options):
    refused_everywhere(
        world,
        lambda wrong: moecomm.Communicator(world, **{"timeout": 20, **(options if wrong else {})}),
        *options,
    )


@pytest.mark.parametrize(
    "name,value",
    [("RAIL", "foo"), ("CHECK", "maybe"), ("CHANNELS", "-1"), ("POPULATE_BYTES", "1GB"), ("ISA", "sse9")],
)
def test_wrong_environment_of_one_rank(world, monkeypatch, name, value):
    """The world and all Buffers read it; with the correct variable the ranks work again."""

    def with_variable(make):
        def on(wrong):
            if wrong:
                monkeypatch.setenv(f"MOECOMM_{name}", value)
            make()

        return on

    expected = f"MOECOMM_{name} is '{value}'; expected "
    refused_everywhere(world, with_variable(lambda: moecomm.Communicator(world, timeout=20)), expected)
    monkeypatch.delenv(f"MOECOMM_{name}", raising=False)
    with moecomm.Communicator(world, timeout=20) as comm:
        refused_everywhere(world, with_variable(lambda: moecomm.Buffer(comm, **GOOD)), expected)
        monkeypatch.delenv(f"MOECOMM_{name}", raising=False)
        moecomm.Buffer(comm, **GOOD).close()


@pytest.mark.parametrize("name,value,first", [("CHECK", "1", "False"), ("RAIL", "loopback", "'ucx'")])
def test_environment_that_differs(world, monkeypatch, name, value, first):
    if world.rank == 1:
        monkeypatch.setenv(f"MOECOMM_{name}", value)
    with (
        pytest.raises(
            moecomm.ConfigMismatch, match=f"MOECOMM_{name} differs.*rank 0 has {first}, rank 1 has "
        ),
        moecomm.Communicator(world, ranks_per_node=1, timeout=20) as comm,
    ):
        moecomm.Buffer(comm, **GOOD)


@pytest.mark.parametrize("name,value", [("timeout", 7.0), ("ranks_per_node", 1)])
def test_communicator_arguments(world, name, value):
    with pytest.raises(moecomm.ConfigMismatch, match=f"{name} differs.*rank 0 has .*rank 1 has {value}"):
        moecomm.Communicator(world, **{"timeout": 20.0, **({name: value} if world.rank == 1 else {})})


def test_version(world, monkeypatch):
    if world.rank == 1:
        monkeypatch.setattr(moecomm.communicator, "__version__", "0.0.1")
    with pytest.raises(
        moecomm.ConfigMismatch,
        match=f"version differs.*rank 0 has '{moecomm.__version__}', rank 1 has '0.0.1'",
    ):
        moecomm.Communicator(world, timeout=20.0)


@pytest.mark.parametrize(
    "option", [dict(layout="rank"), dict(expert_alignment=4), dict(capacity=100)], ids=str
)
def test_options_of_a_call(world, option):
    with moecomm.Communicator(world, timeout=20) as comm:
        buf = moecomm.Buffer(comm, **GOOD)
        x, ids = torch.randn(4, 64).bfloat16(), torch.tensor([[0, 23]] * 4)
        with pytest.raises(moecomm.ConfigMismatch, match="layout, expert_alignment, capacity"):
            buf.dispatch(x, ids, **(option if comm.rank == 1 else {}))
        out = buf.dispatch(x, ids)  # still usable
        assert int(out.tokens_per_expert.sum()) == (4 * comm.size if comm.rank in (0, comm.size - 1) else 0)
        comm.barrier()
