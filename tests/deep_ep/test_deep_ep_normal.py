"""deep_ep's Buffer on moecomm: the normal and low-latency verbs, on rank threads and processes, one node and two."""

import deep_ep_oracle
import pytest
import torch

import moecomm
from moecomm.integrations import deep_ep


@pytest.mark.parametrize("size,nodes", [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_normal_mode_of_rank_threads(size, nodes):
    """Layout, dispatch and combine equal the contract in one node, and between nodes."""
    moecomm.run_local(
        lambda comm: deep_ep_oracle.check_normal(comm, comm.rank, size, nodes),
        size,
        ranks_per_node=size // nodes,
    )


@pytest.mark.parametrize("size,nodes", [(1, 1), (2, 1), (4, 2)])
def test_low_latency_of_rank_threads(size, nodes):
    """All formats, hooks, zero copy, counters and masks."""
    moecomm.run_local(
        lambda comm: deep_ep_oracle.check_low_latency(comm, comm.rank, size),
        size,
        ranks_per_node=size // nodes,
    )


@pytest.mark.parametrize("size,check", [(2, "check_normal"), (4, "check_normal"), (2, "check_low_latency")])
def test_process_groups(processes, tmp_path, size, check):
    """The same with a torch ProcessGroup, after install()."""
    deep_ep_oracle.run_processes(processes, tmp_path, size, check)


def test_results_may_live_for_ever():
    """More results are held than the first arena can contain: none is refused, and none changes."""

    def hold(comm):
        buffer = deep_ep.Buffer(comm)
        ids = torch.arange(comm.size).repeat(16, 1)
        held = []
        for step in range(24):
            out = deep_ep_oracle.layout_and_dispatch(
                buffer,
                torch.full((16, 64), float(step), dtype=torch.bfloat16),
                ids,
                torch.ones(ids.shape),
                comm.size,
            )
            held.append((step, out[0], out[4]))
        assert all((rows == step).all() for step, rows, _ in held)
        return [float(buffer.combine(rows, handle)[0].sum()) for _, rows, handle in held] == [
            16.0 * 64 * step * comm.size for step, _, _ in held
        ]

    assert all(moecomm.run_local(hold, 2))


def test_a_refusal_reaches_the_peers():
    """One rank's invalid argument is an error on all ranks in that call, and the next call is correct."""

    def refuse(comm):
        buffer = deep_ep.Buffer(comm)
        x, ids = torch.full((4, 64), float(comm.rank + 1)).bfloat16(), torch.arange(2).repeat(4, 1)
        bad = ids + 9 if comm.rank == 1 else ids
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2)
        with pytest.raises(moecomm.InvalidArgument, match="topk_idx contains ids from 9 to 10"):
            buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, bad, torch.ones(4, 2))
        with pytest.raises(moecomm.ConfigMismatch, match="num_worst_tokens is"):
            buffer.dispatch(
                x,
                None,
                per_rank,
                None,
                in_rank,
                per_expert,
                ids,
                torch.ones(4, 2),
                num_worst_tokens=8 + comm.rank,
            )
        out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, ids, torch.ones(4, 2))
        assert out[0].float().mean(1).tolist() == [1.0] * 4 + [2.0] * 4
        with pytest.raises(moecomm.CapacityExceeded, match="capacity"):
            buffer.dispatch(
                x, None, per_rank, None, in_rank, per_expert, ids, torch.ones(4, 2), num_worst_tokens=7
            )

    moecomm.run_local(refuse, 2)
