"""Inputs of the decode verbs from other libraries, and under torch's modes."""

import numpy as np
import pytest
import torch
from worlds import assert_same, random_world

import moecomm

SHAPE = dict(hidden=64, num_experts=4, top_k=2, max_tokens=5, dtype=torch.float32)


def step(buf, x, ids, weights, out=None):
    """Return (received rows, counts, y) of one step whose experts multiply by two."""
    received, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
    rows = received.handle.rows.copy_(received.x * 2)
    y, _ = buf.decode_combine(rows, ids, weights, received.handle, return_hook=False, out=out)
    return (
        [received.x[e, :n].clone() for e, n in enumerate(received.counts.tolist())],
        received.counts.clone(),
        y,
    )


def test_numpy_goes_in_through_dlpack():
    xs, ids, weights = random_world(2, 5, 64, 4, 2, dtype=torch.float32, seed=3)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(comm, **SHAPE)
        plain = step(buf, xs[r], ids[r], weights[r])
        arrays = step(buf, xs[r].numpy(), ids[r].numpy(), weights[r].numpy())
        for a, b in zip([*plain[0], *plain[1:]], [*arrays[0], *arrays[1:]], strict=True):
            assert_same(b, a, "array")
        received, _ = buf.decode_dispatch(xs[r], ids[r], quant=None, return_hook=False)
        rows = (received.x * 2).numpy()
        assert_same(
            buf.decode_combine(rows, ids[r], weights[r], received.handle, return_hook=False)[0],
            plain[2],
            "y of staged rows",
        )

    moecomm.run_local(main, 2)


def test_memory_made_in_inference_mode_serves_outside():
    xs, ids, weights = random_world(2, 5, 64, 4, 2, dtype=torch.float32, seed=4)

    def main(comm):
        buf = moecomm.Buffer(comm, **SHAPE)
        with torch.inference_mode():
            first = step(buf, xs[comm.rank], ids[comm.rank], weights[comm.rank])[2]
        for _ in range(2):  # both parities
            assert_same(step(buf, xs[comm.rank], ids[comm.rank], weights[comm.rank])[2], first, "y")

    moecomm.run_local(main, 2)


@pytest.mark.parametrize(
    "place,bad,said",
    [
        (0, [1.0], "x is a list"),
        (0, None, "x is a NoneType"),
        (1, [[0, 1]], "topk_ids is a list"),
        (1, None, "topk_ids is a NoneType"),
        (0, torch.ones(5, 64).to_sparse(), "x is torch.sparse_coo; expected a dense tensor"),
        (0, torch.ones(5, 64, device="meta"), "x is .* on meta; expected"),
    ],
)
def test_what_is_no_tensor_is_named(place, bad, said):
    (x,), (ids,), (weights,) = random_world(1, 5, 64, 4, 2, dtype=torch.float32, seed=5)
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    given = [x, ids]
    given[place] = bad
    with pytest.raises(moecomm.InvalidArgument, match=f"decode_dispatch on rank 0: {said}"):
        buf.decode_dispatch(*given, quant=None)
    received, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
    for options, said in [
        (dict(rows=None), "rows is a NoneType"),
        (dict(topk_ids=[1]), "topk_ids is a list"),
        (dict(out=[1]), "out is a list"),
        (dict(wire=["fp8"]), "wire is"),
    ]:
        with pytest.raises(moecomm.InvalidArgument, match=f"decode_combine.*{said}"):
            buf.decode_combine(
                **{
                    **dict(
                        rows=received.handle.rows, topk_ids=ids, topk_weights=weights, handle=received.handle
                    ),
                    **options,
                }
            )


@pytest.mark.parametrize("in_place", [True, False])
def test_the_result_has_memory_of_its_own(in_place):
    """Peers read the rows while a rank writes its result."""
    (x,), (ids,), (weights,) = random_world(1, 5, 64, 4, 2, dtype=torch.float32, seed=6)
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    y = step(buf, x, ids, weights)[2]
    received, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
    received.handle.rows.copy_(received.x * 2)
    rows = received.handle.rows if in_place else received.handle.rows.clone()
    for out, said in [
        (rows[1, :5], "out shares memory with rows"),
        (np.broadcast_to(np.float32(0), (5, 64)), "out is a read-only array"),
    ]:
        with pytest.raises(moecomm.InvalidArgument, match=f"decode_combine on rank 0: {said}"):
            buf.decode_combine(rows, ids, weights, received.handle, out=out)
    assert_same(
        buf.decode_combine(rows, ids, weights, received.handle, return_hook=False, out=torch.empty_like(x))[
            0
        ],
        y,
        "y",
    )


@pytest.mark.parametrize("with_out", [True, False])
def test_gradients_are_refused(with_out):
    """The decode path has no backward. An input that requires a gradient is named, and the peers get an error."""
    xs, ids, weights = random_world(2, 5, 64, 4, 2, dtype=torch.float32, seed=7)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(comm, **SHAPE)
        want = step(buf, xs[r], ids[r], weights[r])[2]
        out = torch.empty_like(xs[r]) if with_out else None

        def dispatch(x=xs[r], topk_weights=None, quant=None):
            return buf.decode_dispatch(x, ids[r], topk_weights=topk_weights, quant=quant, return_hook=False)

        def refused(op, name, call, *args, **options):
            with pytest.raises(moecomm.InvalidArgument) as error:
                call(*args, **options)
            if r == 0:
                assert (
                    f"{name} requires a gradient, but {op} is not differentiable; pass {name}.detach()"
                    in str(error.value)
                )
                assert "dispatch and combine" in str(error.value)
            else:
                assert error.value.peer == 0

        def wanting(t):
            return t.clone().requires_grad_() if r == 0 else t

        refused("decode_dispatch", "x", dispatch, wanting(xs[r]))
        refused("decode_dispatch", "topk_weights", dispatch, topk_weights=wanting(weights[r]))
        codes, scales = moecomm.quant.quantize(xs[r])
        refused("decode_dispatch", "scales", dispatch, (codes, wanting(scales)))

        for name in ("rows", "topk_weights", "handle.rows"):
            received, _ = dispatch()
            rows = received.handle.rows.copy_(received.x * 2)
            if name == "handle.rows" and r == 0:
                rows.copy_(wanting(received.x) * 2)
            args = [wanting(rows) if name == "rows" else rows, ids[r], weights[r], received.handle]
            args[2] = wanting(weights[r]) if name == "topk_weights" else weights[r]
            refused(
                "decode_combine",
                name.removeprefix("handle."),
                buf.decode_combine,
                *args,
                return_hook=False,
                out=out,
            )

        for _ in range(2):  # the window is free of the graph, in both parities
            assert_same(step(buf, xs[r], ids[r], weights[r], out)[2], want, "y")
        with torch.no_grad():
            y = step(buf, wanting(xs[r]), ids[r], wanting(weights[r]), out)[2]
        assert_same(y, want, "y without gradients")

    moecomm.run_local(main, 2)


def test_gradients_are_refused_with_a_placement():
    """The refusal comes before replicas are chosen: the monitor does not count a refused batch."""
    (x,), (ids,), _ = random_world(1, 5, 64, 4, 2, dtype=torch.float32, seed=8)
    placement = moecomm.balance.rebalance(
        torch.ones(1, 4), num_replicas=4, num_groups=1, num_nodes=1, num_ranks=1
    )
    monitor = moecomm.balance.LoadMonitor(1, 4)
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE, placement=placement, monitor=monitor)
    with pytest.raises(moecomm.InvalidArgument, match="x requires a gradient"):
        buf.decode_dispatch(x.clone().requires_grad_(), ids, quant=None)
    assert monitor.batches.tolist() == [0]
