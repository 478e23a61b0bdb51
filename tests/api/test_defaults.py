"""torch's default dtype and default device do not change the results or the library's own tensors."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

import moecomm
from moecomm import quant, sim
from moecomm._cuda import cuda
from moecomm.balance import LoadMonitor, rebalance
from moecomm.nn import MoE


@contextlib.contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    """Set torch's defaults for a while."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


EVERY = pytest.mark.parametrize(
    "dtype,device", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
)
SHAPE = dict(hidden=64, num_experts=4, top_k=2, max_tokens=4, dtype=torch.float32)
X = torch.arange(256, dtype=torch.float32).view(4, 64)
IDS = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3]])
WEIGHTS = torch.rand(4, 2)


def lost(comm):
    """Return weights and results when experts 1 and 2 have no replicas left."""
    placement = rebalance([[1.0, 1.0, 1.0, 1.0]], num_replicas=4, num_ranks=2).surviving([0])
    buf = moecomm.Buffer(comm, **SHAPE, placement=placement, renormalize=True, monitor=LoadMonitor(1, 4))
    out = buf.dispatch(X, IDS)
    return (
        out.topk_weights,
        buf.combine(out.x.clone(), out.handle, topk_weights=out.topk_weights),
        out.lost_weight,
    )


@EVERY
def test_lost_experts(dtype, device):
    comm = moecomm.Communicator()
    want = lost(comm)
    with defaults(dtype, device):
        for have, expected in zip(lost(comm), want, strict=True):
            assert have.dtype == torch.float32 and torch.equal(have, expected)


def calls(buf):
    """Return the results of all verbs for fixed inputs."""
    out = buf.dispatch(X, IDS, WEIGHTS)
    yield out.x
    yield out.topk_weights
    yield out.tokens_per_expert
    yield buf.combine(out.x.clone(), out.handle, topk_weights=out.topk_weights, bias=X[0])
    out = buf.dispatch(X, IDS, WEIGHTS, layout="rank", quant=None)
    yield out.topk_ids
    yield out.source_token
    received, _ = buf.decode_dispatch(X, IDS, quant=None, return_hook=False)
    yield received.counts
    received.handle.rows.copy_(received.x)
    y, _ = buf.decode_combine(received.handle.rows, IDS, WEIGHTS, received.handle, return_hook=False)
    yield y
    codes, scales = quant.quantize(torch.cat([X, X], 1), scale="ue8m0")
    yield quant.dequantize(codes, scales)
    codes, scales = quant.transpose_requantize(codes, scales)
    yield scales
    yield quant.decode_wire(quant.encode_wire(X, "logfmt10"), 64, "logfmt10")
    x = X.clone().requires_grad_()
    out = buf.dispatch(x, IDS, WEIGHTS)
    buf.combine(out.x * 2, out.handle, topk_weights=out.topk_weights).sum().backward()
    yield x.grad


@EVERY
def test_verbs(dtype, device):
    comm = moecomm.Communicator()
    want = [t.clone() for t in calls(moecomm.Buffer(comm, **SHAPE))]
    with defaults(dtype, device):
        have = [t.clone() for t in calls(moecomm.Buffer(comm, **SHAPE))]
    for i, (a, b) in enumerate(zip(have, want, strict=True)):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), i


@EVERY
def test_simulated_and_oracle(dtype, device):
    """The simulator, the oracle and replica tables stay on the CPU and have the documented dtypes."""
    with defaults(dtype, device):
        cluster = sim.Cluster(
            2, hidden=64, num_experts=4, top_k=2, max_tokens=4, payload=True, dtype=torch.float32
        )
        received = cluster.dispatch([X, X], [IDS, IDS], [WEIGHTS, WEIGHTS])
        want = moecomm.reference.dispatch([X, X], [IDS, IDS], [WEIGHTS, WEIGHTS], num_experts=4)
    for have, expected in zip(received, want, strict=True):
        assert torch.equal(have.x, expected.x) and torch.equal(have.topk_weights, expected.topk_weights)
        assert have.tokens_per_expert.dtype == expected.tokens_per_expert.dtype == torch.int64
        assert torch.equal(have.tokens_per_expert, expected.tokens_per_expert)


def test_layer_is_made_as_torch_makes_layers():
    """Parameters follow the defaults like those of torch's layers. The balancing bias is float32."""
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    with defaults(torch.float64, "meta"):
        layer = MoE(64, 32, 4, 2, buffer=buf)
    assert layer.experts.down.device.type == layer.gate.weight.device.type == "meta"
    assert (
        layer.gate.weight.dtype == torch.float64
        and layer.gate.bias.dtype == torch.float32
        and layer.experts.down.dtype == torch.float32
    )


def test_no_default_device_sees_the_memory_of_a_gpu():
    """A default device is a mode that rewrites torch's constructors: it would copy a GPU's memory elsewhere. The look
    at that memory passes such modes by, and fails here only because there is no GPU.
    """
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    described = {"shape": (16,), "typestr": "|u1", "data": (256, False), "version": 2}
    area = SimpleNamespace(__cuda_array_interface__=described)
    with Mode(), contextlib.suppress(RuntimeError):
        cuda.memory_of(area)
    assert seen == []
