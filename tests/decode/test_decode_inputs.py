"""What decode's verbs are given by other libraries and under torch's modes."""

import numpy as np
import pytest
import torch
from worlds import assert_same, random_world

import moecomm

SHAPE = dict(hidden=64, num_experts=4, top_k=2, max_tokens=5, dtype=torch.float32)


def step(buf, x, ids, weights, out=None):
    """(received rows, counts, y) of one step whose experts double."""
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
        (np.broadcast_to(np.float32(0), (5, 64)), "out is an array that may not be written to"),
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
