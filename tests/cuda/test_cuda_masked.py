"""Captured decode steps behind a mask: the same graphs go on without a rank that has ended. On the emulated GPU."""

import pytest
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture
from masked import oracle
from worlds import assert_same, random_world

import moecomm

HIDDEN, TOKENS, K, TIMEOUT = 64, 6, 2, 3.0
LOST = (moecomm.PeerLost, moecomm.PeerTimeout)


def run(main, nodes, per_node):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(
        main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=TIMEOUT
    )


class Steps:
    """Two captured steps of a rank."""

    def __init__(self, comm, gpu, seed, travel=False):
        size = comm.size
        self.comm, self.travel = comm, travel
        self.xs, self.ids, self.weights = random_world(size, TOKENS, HIDDEN, 2 * size, K, seed=seed)
        self.buf = buf = moecomm.Buffer(
            comm,
            hidden=HIDDEN,
            num_experts=2 * size,
            top_k=K,
            max_tokens=TOKENS,
            num_sms=2,
            decode=True,
        )
        r = comm.rank
        self.x, ids, w = self.xs[r].clone(), self.ids[r], self.weights[r]
        self.y = [torch.empty_like(self.x) for _ in range(2)]

        def dispatch():
            recv, _ = buf.decode_dispatch(
                self.x, ids, topk_weights=w if travel else None, quant=None, return_hook=False
            )
            return recv

        def combine(recv, y):
            weights = None if travel else w
            buf.decode_combine(recv.x, ids, weights, recv.handle, return_hook=False, out=y)

        combine(dispatch(), self.y[0])
        comm.barrier()
        with gpu.capture() as self.graph:
            for y in self.y:
                combine(dispatch(), y)

    def replay(self, n, masked=()):
        """Replay with other rows, and compare with the oracle."""
        now = [(t.float() * (n + 1) / 16).bfloat16() for t in self.xs]
        self.x.copy_(now[self.comm.rank])
        for y in self.y:
            y.fill_(float("nan"))
        self.graph.replay()
        self.comm.synchronize()
        size, r = self.comm.size, self.comm.rank
        _, ys = oracle(
            masked,
            now,
            self.ids,
            self.weights,
            2 * size,
            TOKENS,
            self.comm.ranks_per_node,
            self.travel,
        )
        for i, y in enumerate(self.y):
            assert_same(y, ys[r], f"replay {n}, step {i}, without {masked}: y of rank {r}")


@pytest.mark.parametrize("nodes,per_node,travel", [(1, 3, True), (3, 1, False), (2, 2, True)])
def test_a_graph_goes_on_without_ranks_that_end_between_replays(emulated, nodes, per_node, travel):  # noqa: F811
    def main(comm):
        steps, masked = Steps(comm, emulated, 3, travel), ()
        for victim in (1, nodes * per_node - 1):
            for n in range(3):
                steps.replay(n, masked)
            if comm.rank == victim:
                return
            with pytest.raises(LOST):
                steps.replay(3)
            steps.buf.mask([victim])
            masked = (*masked, victim)
        for n in range(4, 9):
            steps.replay(n, masked)

    run(main, nodes, per_node)


@pytest.mark.parametrize("nodes,per_node", [(1, 3), (3, 1)])
def test_a_rank_that_ends_inside_a_replay(emulated, nodes, per_node):  # noqa: F811
    """Its kernel has sent its tokens, and there is none that would answer."""

    def main(comm):
        steps = Steps(comm, emulated, 4)
        for n in range(2):
            steps.replay(n)
        if comm.rank == 2:
            steps.buf.decode_dispatch(steps.x, steps.ids[2], quant=None)
            return
        with pytest.raises(LOST):
            steps.replay(2)
        steps.buf.mask([2])
        for n in range(3, 9):
            steps.replay(n, (2,))
        recv, _ = steps.buf.decode_dispatch(steps.x, steps.ids[comm.rank], quant=None, return_hook=False)
        assert recv.counts.shape == (2,)

    run(main, nodes, per_node)


def test_a_mask_inside_a_capture_is_refused(emulated):  # noqa: F811
    def main(comm):
        steps = Steps(comm, emulated, 5)
        with (
            emulated.capture(),
            pytest.raises(moecomm.InvalidArgument, match="expected mask between two replays"),
        ):
            steps.buf.mask([1])

    run(main, 1, 1)
