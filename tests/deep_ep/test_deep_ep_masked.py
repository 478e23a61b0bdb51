"""The masks of deep_ep's low-latency verbs."""

import pytest
import torch
from masked import oracle
from worlds import assert_same, random_world

import moecomm
from moecomm.integrations import deep_ep

HIDDEN, MOST, K = 128, 6, 2


@pytest.mark.parametrize("size,per_node", [(3, 3), (4, 2)])
def test_low_latency_verbs_go_on_without_a_dead_rank(size, per_node):
    victim = 1

    def main(comm):
        rank, experts = comm.rank, 2 * size
        buffer = deep_ep.Buffer(comm, low_latency_mode=True, enable_shrink=True)
        status = torch.full((size,), 7, dtype=torch.int32)

        def step(seed, masked, use_fp8=False):
            xs, ids, weights = random_world(size, MOST, HIDDEN, experts, K, seed=seed)
            recv, count, handle, _, _ = buffer.low_latency_dispatch(
                xs[rank], ids[rank], MOST, experts, use_fp8=use_fp8
            )
            y, _, _ = buffer.low_latency_combine(recv.clone(), ids[rank], weights[rank], handle)
            want, ys = oracle(masked, xs, ids, weights, experts, MOST, per_node)
            assert count.tolist() == want[rank].counts.tolist()
            assert_same(y, ys[rank], f"step {seed} on rank {rank}")

        for seed in range(3):
            step(seed, ())
        buffer.low_latency_clean_mask_buffer()
        if rank == victim:
            return
        with pytest.raises((moecomm.PeerLost, moecomm.PeerTimeout)):
            for seed in range(3):
                step(seed, ())
        buffer.low_latency_update_mask_buffer(victim, True)
        buffer.low_latency_update_mask_buffer(victim, True)  # it is
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(r == victim) for r in range(size)]
        for seed in range(10, 14):
            step(seed, (victim,))
        for call in (
            lambda: buffer.low_latency_update_mask_buffer(victim, False),
            buffer.low_latency_clean_mask_buffer,
        ):
            with pytest.raises(deep_ep.Unsupported, match="rank 1 is masked and cannot return"):
                call()

    moecomm.run_local(main, size, ranks_per_node=per_node, timeout=2.0)
