"""deep_ep's HybridEPBuffer on moecomm: dispatch and combine by token and by expert, on threads and processes."""

import deep_ep_hybrid
import deep_ep_oracle
import pytest
import torch

import moecomm
from moecomm.integrations import deep_ep


@pytest.mark.parametrize("size,nodes", [(1, 1), (2, 1), (4, 2)])
def test_rank_threads(size, nodes):
    """Every result equals the contract."""
    moecomm.run_local(
        lambda comm: deep_ep_hybrid.check(comm, comm.rank, size, nodes), size, ranks_per_node=size // nodes
    )


def test_process_group(processes, tmp_path):
    """The same with a torch ProcessGroup."""
    deep_ep_oracle.run_processes(processes, tmp_path, 2, "check_hybrid")


def with_hybrid(fn, size=1):
    """Run fn(HybridEPBuffer, rank) on all ranks."""
    return moecomm.run_local(lambda comm: fn(deep_ep.HybridEPBuffer(comm, 64, 4, 2), comm.rank), size)


X, MAP = torch.zeros(3, 64).bfloat16(), torch.ones(3, 2).bool()
REFUSED = {
    "hidden_dim is 0": lambda: moecomm.run_local(lambda comm: deep_ep.HybridEPBuffer(comm, 0, 4, 2), 1),
    "group is None": lambda: deep_ep.HybridEPBuffer(None, 64, 4, 2),
    "both None or both given": lambda: with_hybrid(lambda b, r: b.dispatch(X)),
    "num_of_experts is 3": lambda: with_hybrid(lambda b, r: b.dispatch(X, routing_map=MAP, num_of_experts=3)),
    "num_permuted_tokens is None": lambda: with_hybrid(
        lambda b, r: b.dispatch_with_permute(hidden=X, routing_map=MAP, non_blocking=True)
    ),
    "multiple of pad_multiple": lambda: with_hybrid(
        lambda b, r: b.dispatch_with_permute(hidden=X, routing_map=MAP, pad_multiple=8, num_permuted_tokens=9)
    ),
    "use_fp8 is set": lambda: with_hybrid(
        lambda b, r: b.dispatch_with_permute(hidden=X, routing_map=MAP, use_fp8=True)
    ),
    "because a handle is given": lambda: with_hybrid(
        lambda b, r: b.dispatch(X, routing_map=MAP, handle=b.dispatch(X, routing_map=MAP)[3])
    ),
    "from the other dispatch": lambda: with_hybrid(
        lambda b, r: b.combine_with_unpermute(hidden=X, handle=b.dispatch(X, routing_map=MAP)[3])
    ),
    "handle is a NoneType": lambda: with_hybrid(lambda b, r: b.combine(X)),
    "belongs to hybrid-ep's kernels": lambda: with_hybrid(
        lambda b, r: b.dispatch(X, routing_map=MAP)[3][0].shape
    ),
    "ids from 0 to 7": lambda: deep_ep.hybrid_ep_buffer.indices_to_map(torch.tensor([[0, 7]]), None, 1, 4),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused(said):
    """A typed error names the argument, its value, and the expectation."""
    with pytest.raises(moecomm.InvalidArgument, match=said):
        REFUSED[said]()


def test_more_than_the_constructor_says():
    """More tokens and rows enlarge the configuration, equally on all ranks."""

    def grow(b, rank):
        assert b.dispatch(torch.zeros(5 + rank, 128), routing_map=torch.ones(5 + rank, 4).bool())[
            0
        ].shape == (11, 128)
        return b.config.hidden_dim, b.config.max_num_of_tokens_per_rank

    assert with_hybrid(grow, 2) == [(128, 6)] * 2
