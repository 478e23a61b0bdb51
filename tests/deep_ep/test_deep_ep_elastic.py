"""deep_ep's ElasticBuffer on moecomm: both layouts, with and without counts on the host, on threads and processes."""

import deep_ep_elastic
import deep_ep_oracle
import pytest
import torch

import moecomm
from moecomm.integrations import deep_ep


@pytest.mark.parametrize("size,nodes", [(1, 1), (2, 1), (4, 2)])
def test_rank_threads(size, nodes):
    """Every result equals the contract."""
    moecomm.run_local(
        lambda comm: deep_ep_elastic.check(comm, comm.rank, size, nodes), size, ranks_per_node=size // nodes
    )


def test_process_group(processes, tmp_path):
    """The same with a torch ProcessGroup."""
    deep_ep_oracle.run_processes(processes, tmp_path, 2, "check_elastic")


def with_elastic(fn, size=1, **how):
    """Run fn(ElasticBuffer, rank) on all ranks."""
    how = {"num_bytes": 1, **how}
    return moecomm.run_local(lambda comm: fn(deep_ep.ElasticBuffer(comm, **how), comm.rank), size)


X, IDS = torch.zeros(3, 64).bfloat16(), torch.zeros(3, 1, dtype=torch.int64)
REFUSED = {
    "num_cpu_bytes is 5": lambda: with_elastic(None, num_cpu_bytes=5),
    "expected num_bytes, or both": lambda: with_elastic(None, num_bytes=None),
    "num_gpu_timeout_secs is 0": lambda: with_elastic(None, num_gpu_timeout_secs=0),
    "num_experts is None": lambda: with_elastic(lambda b, r: b.dispatch(X, IDS)),
    "topk_idx is None": lambda: with_elastic(lambda b, r: b.dispatch(X, num_experts=2)),
    "x has 3 tokens": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, num_experts=2, num_max_tokens_per_rank=2)
    ),
    "num_max_tokens_per_rank is 0": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, num_experts=2, do_cpu_sync=False)
    ),
    "do_zero_padding is set": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, num_experts=2, do_zero_padding=True)
    ),
    "expected allocate_on_comm_stream=True": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, num_experts=2, previous_event=b.capture())
    ),
    "topk_idx is given; expected None": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, handle=b.dispatch(X, IDS, num_experts=2)[3])
    ),
    "do_expand is True; expected": lambda: with_elastic(
        lambda b, r: b.dispatch(X, do_expand=True, handle=b.dispatch(X, IDS, num_experts=2)[3])
    ),
    "handle is a NoneType": lambda: with_elastic(lambda b, r: b.combine(X, None)),
    "combine kernel": lambda: with_elastic(
        lambda b, r: b.dispatch(X, IDS, num_experts=2)[3].recv_src_metadata
    ),
    "engram_write": lambda: with_elastic(lambda b, r: b.engram_write()),
    "pp_send": lambda: with_elastic(lambda b, r: b.pp_send(1)),
    "all_gather": lambda: with_elastic(lambda b, r: b.all_gather()),
    "explicitly_destroy=False": lambda: with_elastic(lambda b, r: b.destroy()),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused(said):
    """A typed error names the argument, its value, and the expectation."""
    with pytest.raises(moecomm.InvalidArgument, match=said):
        REFUSED[said]()


def test_sizes_and_sms():
    """Sizes from the shape without a call; multiprocessors are even and positive, also for unknown links."""

    def look(b, rank):
        assert (
            b.num_bytes > 4096 * 7168 * 2
            and b.get_theoretical_num_sms(256, 8) % 2 == 0
            and 2 <= b.get_theoretical_num_sms(256, 8) <= 64
        )
        assert b.get_theoretical_num_sms(8, 1, 1, 0, 0) >= 2 and b.get_theoretical_num_qps(12) == 9
        assert (
            b.get_logical_domain_size()
            == b.get_physical_domain_size()
            == (1, 2)
            == deep_ep.get_physical_domain_size(b.group)
        )
        assert deep_ep.get_logical_domain_size(b.group, False) == (1, 2) and b.get_comm_stream() is None
        with pytest.raises(
            moecomm.InvalidArgument,
            match="x has 3 tokens|refused" if rank else "rank 1 refused its arguments.*x has 3 tokens",
        ):
            b.dispatch(
                X[: 3 if rank else 1], IDS[: 3 if rank else 1], num_experts=2, num_max_tokens_per_rank=2
            )
        assert b.dispatch(X, IDS, num_experts=2)[0].shape[0] == (0 if rank else 6)

    with_elastic(look, 2, num_bytes=None, num_max_tokens_per_rank=4096, hidden=7168)
