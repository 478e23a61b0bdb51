"""A slow rank is reported by the ranks that wait for it, and stays a member."""

import threading
import time

import pytest
import torch

import moecomm
from moecomm.elastic.health import draw_waits


def test_a_slow_rank_is_seen_and_stays(tmp_path):
    seen, waiting = [], threading.Event()

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=4, top_k=1, max_tokens=4)
        x, ids = torch.ones(4, 16).bfloat16(), torch.tensor([[0], [1], [2], [3]])

        def step():
            out = buf.dispatch(x, ids)
            return buf.combine(out.x, out.handle)

        step()
        comm.barrier()
        if comm.rank == 1:  # slow until another rank has reported waiting for it
            assert waiting.wait(60)
        if comm.rank == 0:
            thread = threading.Thread(target=watch, args=(comm,))
            thread.start()
        assert (step() == 1).all()
        if comm.rank == 0:
            thread.join()
            assert comm.health().slow == () and comm.health().waiting_for is None
        peer = next(p for p in comm.health().peers if p.rank == (1 - comm.rank if comm.rank < 2 else 1))
        assert peer.state == "ok"
        return comm.wait_matrix()

    def watch(comm):
        while True:
            health = comm.health(slow_after=0.05)
            if health.slow:
                seen.append(health)
                waiting.set()
                return
            time.sleep(0.005)

    matrix = moecomm.run_local(main, 4, ranks_per_node=4)[0]
    health = seen[0]
    assert health.rank == 0 and len(health.peers) == 3
    (slow,) = health.slow
    told = next(p for p in health.peers if p.rank == slow)
    assert (
        health.waiting_for == slow and health.waiting > 0.05 and told.phase is not None and told.waited > 0.05
    )
    assert matrix.shape == (4, 4) and bool((matrix >= 0).all()) and not bool(matrix.diagonal().any())
    assert float(matrix[0, slow]) > 0.05
    draw_waits(matrix, tmp_path / "waits.png")
    assert (tmp_path / "waits.png").stat().st_size > 1000


def test_a_lost_rank_is_named():
    def main(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=4, top_k=1, max_tokens=4)
        x, ids = torch.ones(4, 16).bfloat16(), torch.tensor([[0], [1], [2], [3]])
        if comm.rank == 1:
            buf.dispatch(x, ids)  # the other rank makes its calls
            raise ValueError("gone")
        try:
            while True:
                out = buf.dispatch(x, ids)
                buf.combine(out.x, out.handle)
        except moecomm.PeerLost:
            states.append({p.rank: p.state for p in comm.health().peers})
            raise

    states = []
    with pytest.raises(ValueError, match="gone"):
        moecomm.run_local(main, 2, ranks_per_node=2)
    assert states == [{1: "lost"}]
