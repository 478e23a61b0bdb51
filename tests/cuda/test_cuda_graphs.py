"""Captures on the emulated GPU: recorded launches are replayed, and calls that cannot be captured are refused.

On a GPU, with torch's graphs: tests/cuda/test_device_bench.py, tests/cuda/test_cuda.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from emulated_gpu import emulated  # noqa: F401 - a fixture
from worlds import assert_same, random_world

import moecomm
from moecomm import cuda, reference
from moecomm.balance import rebalance

HIDDEN, TOKENS, CAPACITY = 64, 6, 40


def make(comm, **more):
    """Make a buffer with two experts per rank."""
    return moecomm.Buffer(
        comm, hidden=HIDDEN, num_experts=2 * comm.size, top_k=2, max_tokens=TOKENS, num_sms=2, **more
    )


def run(main, nodes, per_node):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=20.0)


def test_a_captured_call_is_one_kernel(emulated):  # noqa: F811
    """No copy and no memset comes before it: the last group of a call sets the latches back."""
    xs, ids, weights = random_world(2, TOKENS, HIDDEN, 4, 2, seed=4)

    def main(comm):
        buf, r = make(comm), comm.rank
        for captures in (False, True):
            comm.barrier()
            with emulated.capture() if captures else contextlib.nullcontext(SimpleNamespace()) as graph:
                out = buf.dispatch(xs[r], ids[r], weights[r], capacity=CAPACITY)
                buf.combine(out.x, out.handle, topk_weights=out.topk_weights)
        assert graph.nodes == 2
        comm.barrier()
        buf.close()

    run(main, 1, 2)


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1)])
def test_three_steps_are_captured_and_replayed_101_times(emulated, nodes, per_node):  # noqa: F811
    """A graph has three dispatches and combines.

    Inputs change in place, and outputs are filled with garbage before every replay.
    """
    xs, ids, weights = random_world(nodes * per_node, TOKENS, HIDDEN, 2 * nodes * per_node, 2, seed=4)

    def main(comm):
        buf, r = make(comm), comm.rank
        assert isinstance(buf.backend.memory.native, cuda.NativeBuffer)
        x, y = xs[r].clone(), [torch.empty_like(xs[r]) for _ in range(3)]

        def step(i):
            out = buf.dispatch(x, ids[r], weights[r], capacity=CAPACITY)
            buf.combine(
                out.x, out.handle, topk_weights=out.topk_weights, out=y[i]
            )  # the experts return their input
            return out

        step(0)
        comm.barrier()
        with emulated.capture() as graph:
            outs = [step(i) for i in range(3)]
        for n in range(101):
            now = [(t.float() * (n + 1) / 16).bfloat16() for t in xs]
            x.copy_(now[r])
            for t in (*y, *(o.x for o in outs)):
                t.fill_(float("nan"))
            graph.replay()
            if n % 20 == 0:
                want = reference.dispatch(now, ids, weights, num_experts=2 * comm.size, capacity=CAPACITY)
                sums = reference.combine(
                    [w.x for w in want],
                    want,
                    [TOKENS] * comm.size,
                    ranks_per_node=per_node,
                    topk_weights=[w.topk_weights for w in want],
                )
                for i in range(3):
                    assert_same(outs[i].x, want[r].x, f"replay {n}, step {i}: x")
                    assert_same(y[i], sums[r], f"replay {n}, step {i}: y")
        assert_same(
            buf.dispatch(x, ids[r]).x,
            reference.dispatch(now, ids, num_experts=2 * comm.size)[r].x,
            "behind the graph",
        )
        comm.barrier()

    run(main, nodes, per_node)


def test_decode_is_captured_and_replayed(emulated):  # noqa: F811
    """A graph has two steps. The banks belong to the capture, and each replay advances the epochs."""
    xs, ids, weights = random_world(2, TOKENS, HIDDEN, 4, 2, seed=5)

    def main(comm):
        buf, r = make(comm, decode=True), comm.rank
        x, y = xs[r].clone(), torch.empty_like(xs[r])

        def step():
            recv, _ = buf.decode_dispatch(x, ids[r], quant=None, return_hook=False)
            buf.decode_combine(recv.x, ids[r], weights[r], recv.handle, return_hook=False, out=y)

        step()
        comm.barrier()
        with emulated.capture() as graph:
            step()
            step()
        for n in range(51):
            now = [(t.float() * (n + 1) / 16).bfloat16() for t in xs]
            x.copy_(now[r])
            y.fill_(float("nan"))
            graph.replay()
            want = reference.decode_dispatch(now, ids, num_experts=4, max_tokens=TOKENS)
            assert_same(
                y,
                reference.decode_combine([w.x for w in want], ids, weights, num_experts=4, ranks_per_node=2)[
                    r
                ],
                f"replay {n}: y",
            )
        comm.barrier()

    run(main, 1, 2)


def test_what_needs_the_host_is_refused(emulated, tmp_path):  # noqa: F811
    """The call is refused before any work is enqueued, and the capture continues without it."""

    def main(comm):
        x, ids = torch.randn((TOKENS, HIDDEN)).bfloat16(), torch.tensor([[0, 1]] * TOKENS)
        plain, recording = make(comm), make(comm, record=tmp_path)
        placed = make(comm, placement=rebalance(torch.ones(1, 2), num_replicas=2, num_nodes=1, num_ranks=1))
        handle = placed.dispatch(x, ids).handle
        with emulated.capture() as graph:
            for call, why in (
                (
                    lambda: plain.dispatch(x, ids),
                    "dispatch: capacity is None while a CUDA graph is captured; expected a number of rows",
                ),
                (
                    lambda: recording.dispatch(x, ids, capacity=CAPACITY),
                    "captured, but the buffer has record=, and a recording notes every call",
                ),
                (lambda: recording.decode_dispatch(x, ids), "captured, but the buffer has record="),
                (
                    lambda: placed.dispatch(x, ids, capacity=CAPACITY),
                    "captured, but the buffer has placement, and the host chooses the replicas",
                ),
                (lambda: placed.decode_dispatch(x, ids), "captured, but the buffer has placement"),
            ):
                with pytest.raises(moecomm.InvalidArgument, match=why):
                    call()
            out = placed.dispatch(x, handle=handle)  # its replicas are already chosen
        out.x.zero_()
        graph.replay()
        assert_same(out.x.sort(0).values, x.repeat(2, 1).sort(0).values, "by the handle")
        for buf in (plain, recording, placed):
            assert_same(buf.dispatch(x, ids, capacity=CAPACITY).x[:TOKENS], x, "afterwards")
            buf.close()

    run(main, 1, 1)
