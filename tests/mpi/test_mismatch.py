"""Ranks that disagree learn it together: ConfigMismatch on every rank, naming the argument and the ranks."""

import pytest
import torch

import moecomm

pytestmark = pytest.mark.mpi(min_size=2)
GOOD = dict(hidden=64, num_experts=24, top_k=2, max_tokens=8, dtype=torch.bfloat16)


@pytest.mark.parametrize("name,value", [("hidden", 128), ("num_experts", 48), ("top_k", 3), ("max_tokens", 9), ("dtype", torch.float16),
                                        ("channels", 5), ("arena_bytes", 1 << 20)])
def test_buffer_arguments(world, name, value):
    with moecomm.Communicator(world, timeout=20) as comm:
        last = comm.size - 1
        with pytest.raises(moecomm.ConfigMismatch) as raised:
            moecomm.Buffer(comm, **{**GOOD, **({name: value} if comm.rank == last else {})})
        text = str(raised.value)
        assert name in text and "rank 0" in text and f"rank {last}" in text and str(value) in text, text
        assert raised.value.rank == comm.rank and raised.value.peer == last
        moecomm.Buffer(comm, **GOOD).close()   # the communicator is as good as before


@pytest.mark.parametrize("name,value", [("timeout", 7.0), ("ranks_per_node", 1)])
def test_communicator_arguments(world, name, value):
    with pytest.raises(moecomm.ConfigMismatch, match=f"{name} differs.*rank 0 has .*rank 1 has {value}"):
        moecomm.Communicator(world, **{"timeout": 20.0, **({name: value} if world.rank == 1 else {})})


def test_version(world, monkeypatch):
    if world.rank == 1:
        monkeypatch.setattr(moecomm.communicator, "__version__", "0.0.1")
    with pytest.raises(moecomm.ConfigMismatch, match=f"version differs.*rank 0 has '{moecomm.__version__}', rank 1 has '0.0.1'"):
        moecomm.Communicator(world, timeout=20.0)


@pytest.mark.parametrize("option", [dict(layout="rank"), dict(expert_alignment=4), dict(capacity=100)], ids=str)
def test_options_of_a_call(world, option):
    with moecomm.Communicator(world, timeout=20) as comm:
        buf = moecomm.Buffer(comm, **GOOD)
        x, ids = torch.randn(4, 64).bfloat16(), torch.tensor([[0, 23]] * 4)
        with pytest.raises(moecomm.ConfigMismatch, match="layout, expert_alignment, capacity"):
            buf.dispatch(x, ids, **(option if comm.rank == 1 else {}))
        out = buf.dispatch(x, ids)   # usable afterwards
        assert int(out.tokens_per_expert.sum()) == (4 * comm.size if comm.rank in (0, comm.size - 1) else 0)
        comm.barrier()
