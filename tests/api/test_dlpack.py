"""Arrays of other libraries as inputs and outputs.

There is no copy, the results equal those of tensors, and a producer on a GPU gets the right stream.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import assert_same

import moecomm
from moecomm import cuda
from moecomm.arguments import Checks

T, H, K, E = 7, 64, 3, 8


take = Checks(SimpleNamespace(comm=SimpleNamespace(rank=0))).as_tensor  # on rank 0


def inputs(rank):
    """Return float32 rows, ids and weights of one rank: NumPy has no bfloat16."""
    g = torch.Generator().manual_seed(rank)
    return (
        torch.randn((T, H), generator=g),
        torch.rand((T, E), generator=g).argsort(1)[:, :K].contiguous(),
        torch.rand((T, K), generator=g),
        torch.randn((H,), generator=g),
    )


class Producer:
    """Supports only DLPack, and records the requests."""

    def __init__(self, tensor, device=(1, 0)):
        self.tensor, self.device, self.asked = tensor, device, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **how):
        self.asked.append(how)
        return self.tensor.__dlpack__()


def test_numpy_arrays_are_views():
    for array in (
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.zeros((0, 4), np.int64),
        np.ones((2, 2), np.int32),
    ):
        t = take("dispatch", "x", array)
        assert t.shape == array.shape and (array.size == 0 or t.data_ptr() == array.ctypes.data)


def test_numpy_in_and_out():
    """dispatch and combine of NumPy arrays, with `out` written in place, equal those of tensors bit for bit."""

    def main(comm):
        x, ids, weights, bias = inputs(comm.rank)
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32)
        want = buf.dispatch(x, ids, weights)
        y = buf.combine(want.x * 2, want.handle, topk_weights=want.topk_weights, bias=bias)
        out = buf.dispatch(x.numpy(), ids.numpy().astype(np.int32), weights.numpy())
        for name in ("x", "topk_weights", "tokens_per_expert", "source_token"):
            assert_same(getattr(out, name), getattr(want, name), name)
        rows = np.asarray(out.x)  # a view of the window
        assert rows.ctypes.data == out.x.data_ptr()
        result = np.full((T, H), np.nan, np.float32)
        given = buf.combine(
            rows * 2, out.handle, topk_weights=np.asarray(out.topk_weights), bias=bias.numpy(), out=result
        )
        assert given.data_ptr() == result.ctypes.data
        assert_same(torch.from_numpy(result), y, "y")

    moecomm.run_local(main, 2)


def test_numpy_in_decode():
    def main(comm):
        x, ids, weights, _ = inputs(comm.rank)
        buf = moecomm.Buffer(
            comm, hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32, decode=True
        )
        results = []
        for convert in (lambda t: t, lambda t: t.numpy(), Producer):
            recv, _ = buf.decode_dispatch(convert(x), convert(ids), quant=None, return_hook=False)
            y = torch.full((T, H), float("nan"))
            buf.decode_combine(
                convert(recv.x * 3),
                convert(ids),
                convert(weights),
                recv.handle,
                return_hook=False,
                out=convert(y),
            )
            results.append(y)
        for y in results[1:]:
            assert_same(y, results[0], "y")
        assert not results[0].isnan().any()

    moecomm.run_local(main, 2)


def test_a_producer_on_the_host_is_asked_for_no_stream():
    x, ids, weights, _ = map(Producer, inputs(0))

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32)
        return buf.dispatch(x, ids, weights).x.clone(), buf.dispatch(*inputs(0)[:3]).x.clone()

    [(got, want)] = moecomm.run_local(main, 1)
    assert_same(got, want, "x")
    for producer in (x, ids, weights):
        assert len(producer.asked) == 1 and producer.asked[0].get("stream") is None


# In the array API the legacy default stream is 1, the per-thread stream 2, and any other its handle.
@pytest.mark.parametrize("current,expected", [(0, 1), (2, 2), (4660, 4660)])
def test_a_producer_on_a_gpu_is_asked_for_the_call_s_stream(monkeypatch, current, expected):
    """The producer reports GPU 3, but its data is on the host, as there is no GPU here."""
    asked_for = []

    def current_stream(device=None):
        asked_for.append(str(device))
        return SimpleNamespace(cuda_stream=current)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    producer = Producer(torch.ones(4), device=(2, 3))
    assert_same(take("dispatch", "x", producer), torch.ones(4), "x")
    assert asked_for == ["cuda:3"] and producer.asked[0]["stream"] == expected


@pytest.mark.parametrize("value", [3, "rows", [1.0, 2.0], np.array(["a"])])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(
        moecomm.InvalidArgument, match=r"dispatch on rank 0: x is a .*; expected a tensor or a DLPack array"
    ):
        take("dispatch", "x", value)


# -- on a GPU ------------------------------------------------------------------------------------------------

NO_GPU = cuda.why_not()


@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
def test_cupy_in_and_out():
    """Dispatch CuPy arrays just written on their own stream; get results as CuPy arrays of the same memory."""
    cp = pytest.importorskip("cupy")

    def main(comm):
        x, ids, weights, _ = (t.to(comm.device) for t in inputs(comm.rank))
        buf = moecomm.Buffer(
            comm, hidden=H, num_experts=E, top_k=K, max_tokens=T, dtype=torch.float32, num_sms=2
        )
        want = buf.dispatch(x, ids, weights).x.clone()
        busy = cp.cuda.Stream(non_blocking=True)
        with busy:
            late = cp.zeros((T, H), cp.float32)
            for _ in range(200):
                late = late * 0 + 1
            late *= cp.from_dlpack(x)
            out = buf.dispatch(
                late, cp.from_dlpack(ids), cp.from_dlpack(weights)
            )  # CuPy's stream still uses it
        assert_same(out.x, want, "x")
        rows = cp.from_dlpack(out.x)
        assert rows.data.ptr == out.x.data_ptr()
        y = buf.combine(rows, out.handle)
        assert_same(buf.combine(out.x.clone(), out.handle), y, "y")
        torch.cuda.synchronize()
        buf.close()

    moecomm.run_local(main, 2, ranks_per_node=1, device="cuda:0")
