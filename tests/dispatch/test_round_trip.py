"""Dispatch and combine on rank threads, against the oracle, bit for bit."""

import pytest
import torch
from worlds import assert_same, random_world, round_trip

import moecomm

GEOMETRIES = [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4), (5, 1)]  # nodes x ranks per node


@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_geometries(nodes, per_node, layout):
    size = nodes * per_node
    world = random_world(
        size, [3 + 5 * r % 11 for r in range(size)], 64, 4 * size, 4, seed=nodes * 10 + per_node
    )
    moecomm.run_local(
        lambda comm: round_trip(comm, world, num_experts=4 * size, top_k=4, layout=layout),
        size,
        ranks_per_node=per_node,
    )


@pytest.mark.parametrize("nodes,per_node", [(1, 2), (2, 1)])
def test_calls_happen_in_the_order_in_which_they_are_made(nodes, per_node):
    """An asynchronous call is complete before the next call begins, even if no wait() was called."""
    ids = torch.tensor([[0, 1], [1, 0]])

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=8, num_experts=2, top_k=2, max_tokens=2, dtype=torch.float32, arena_bytes=1 << 20
        )
        x = [torch.full((2, 8), float(i), requires_grad=True) for i in range(6)]
        for _ in range(40):
            pending = buf.dispatch(x[0].detach(), ids, async_op=True)
            outs = [
                pending,
                buf.dispatch(x[1].detach(), ids),
                buf.dispatch(x[2].detach(), ids, async_op=True),
                buf.dispatch(x[3], ids),
            ]
            pending = buf.dispatch(x[4].detach(), ids, async_op=True)
            outs[3].x.backward(torch.full((4, 8), 7.0))
            outs = [out.wait() if isinstance(out, moecomm.Pending) else out for out in [*outs, pending]]
            assert [out.x.unique().tolist() for out in outs] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
            assert x[3].grad.unique().tolist() == [14.0]
            x[3].grad = None
            last = buf.dispatch(x[5].detach(), ids, async_op=True)
            received, _ = buf.decode_dispatch(x[5].detach(), ids, quant=None, return_hook=False)
            assert received.x[:, :4].unique().tolist() == last.wait().x.unique().tolist() == [5.0]
        comm.barrier()

    moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, timeout=15)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_results_do_not_depend_on_the_fast_path(layout):
    """Tensors that DLPack's table cannot read (here: a subclass) use the slow path, with the same bits."""

    class Plain(torch.Tensor):
        pass

    world = random_world(4, [5, 0, 3, 6], 64, 8, 3, seed=7)

    def main(comm):
        x, ids, weights = (part[comm.rank] for part in world)
        buf, results = moecomm.Buffer(comm, hidden=64, num_experts=8, top_k=3, max_tokens=6), []
        for wrap in (lambda t: t, lambda t: t.as_subclass(Plain)):
            out = buf.dispatch(wrap(x), wrap(ids.to(torch.int32)), wrap(weights), layout=layout)
            assert ("_tensors" not in vars(out)) == (wrap(x) is x)  # only the fast path makes tensors lazily
            given = out.topk_weights if layout == "expert" else None
            y = buf.combine(wrap(out.x), out.handle, topk_weights=given if given is None else wrap(given))
            results.append(
                [
                    y.as_subclass(torch.Tensor),
                    *(
                        t.clone()
                        for t in (
                            out.x,
                            out.topk_weights,
                            out.source_rank,
                            out.source_token,
                            out.tokens_per_expert,
                            out.rows_per_expert,
                        )
                    ),
                ]
            )
        for a, b in zip(*results, strict=True):
            assert_same(a, b, f"rank {comm.rank}")

    moecomm.run_local(main, 4, ranks_per_node=2, timeout=20)
