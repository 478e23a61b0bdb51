"""Unsupported tensors: subclasses, transforms, tensors without memory.

Each is refused by name, in all verbs.
"""

import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
from emulated_gpu import emulated  # noqa: F401 - a fixture
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import moecomm
from moecomm import quant
from moecomm.balance import Placement, rebalance
from moecomm.grouped import grouped_mm
from moecomm.nn import MoE

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE = dict(hidden=128, num_experts=4, top_k=2, max_tokens=8, dtype=torch.float32)
X, IDS, WEIGHTS = (
    torch.randn(8, 128),
    torch.stack([torch.randperm(4)[:2] for _ in range(8)]),
    torch.rand(8, 2),
)


@functools.cache
def mesh():
    """A mesh of only this process."""
    dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group for this module."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        mesh.cache_clear()


def freed(t):
    """Free the storage, as FSDP does with parameters between uses."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def short(t):
    """Return a tensor whose storage ends before its last element."""
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - 4)
    return t


KINDS = {
    "DTensor; expected a plain tensor, such as .*to_local": lambda t: DTensor.from_local(
        t, mesh(), [Replicate()]
    ),
    "FakeTensor, which has no memory": lambda t: FakeTensorMode().from_tensor(t),
    "TwoTensor, a tensor subclass": lambda t: TwoTensor(t, t),
    "MaskedTensor, a tensor subclass": lambda t: masked_tensor(t, torch.ones_like(t).bool()),
    "nested tensor; expected a dense": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "is a nested tensor;": lambda t: torch.nested.nested_tensor([t[:1], t[1:]], layout=torch.jagged),
    "storage holds 0 bytes": freed,
    "torch.sparse_coo; expected a dense": lambda t: t.to_sparse(),
}


def verbs(buf):
    """Return (name, arguments, call) of all verbs; call(**arguments)."""
    out = buf.dispatch(X, IDS, WEIGHTS)
    received, _ = buf.decode_dispatch(X, IDS, quant=None, return_hook=False)
    codes, scales = quant.quantize(X)
    name, handle = buf.name, out.handle.tensor()
    yield "dispatch", dict(x=X, topk_ids=IDS, topk_weights=WEIGHTS), buf.dispatch
    yield "dispatch", dict(scales=scales), lambda scales: buf.dispatch((codes, scales), IDS)
    yield (
        "combine",
        dict(
            rows=out.x.clone(),
            topk_weights=out.topk_weights.clone(),
            bias=X[0].clone(),
            out=torch.empty(8, 128),
        ),
        functools.partial(buf.combine, handle=out.handle),
    )
    yield (
        "decode_dispatch",
        dict(x=X, topk_ids=IDS, topk_weights=WEIGHTS),
        functools.partial(buf.decode_dispatch, quant=None),
    )
    yield (
        "decode_combine",
        dict(rows=received.x.clone(), topk_ids=IDS, topk_weights=WEIGHTS, out=torch.empty(8, 128)),
        functools.partial(buf.decode_combine, handle=received.handle),
    )
    yield "quantize", dict(x=X), quant.quantize
    yield "dequantize", dict(codes=codes, scales=scales), quant.dequantize
    yield "transpose_requantize", dict(codes=codes, scales=scales), quant.transpose_requantize
    yield "encode_wire", dict(x=X), functools.partial(quant.encode_wire, wire="logfmt10")
    yield (
        "decode_wire",
        dict(coded=quant.encode_wire(X, "logfmt10")),
        functools.partial(quant.decode_wire, hidden=128, wire="logfmt10"),
    )
    yield "MoE", dict(x=X), MoE(128, 64, 4, 2, buffer=buf)
    yield "grouped_mm", dict(x=X, w=torch.randn(4, 128, 64), ends=torch.tensor([2, 4, 6, 8])), grouped_mm
    yield "rebalance", dict(load=torch.ones(1, 4)), functools.partial(rebalance, num_replicas=4, num_ranks=1)
    yield (
        "Placement",
        dict(physical_to_logical=torch.tensor([[0, 1, 2, 3]])),
        functools.partial(Placement, num_experts=4, num_ranks=1),
    )
    yield (
        "moecomm",
        dict(x=X, topk_ids=IDS, topk_weights=WEIGHTS),
        lambda x, topk_ids, topk_weights: torch.ops.moecomm.dispatch(
            x, topk_ids, topk_weights, None, name, "expert", 1, None
        ),
    )
    yield (
        "moecomm",
        dict(rows=out.x.clone(), topk_weights=out.topk_weights.clone()),
        lambda rows, topk_weights: torch.ops.moecomm.combine(
            rows, topk_weights, None, handle, name, "expert", 8
        ),
    )


def refused(match, call, name, argument):
    """Assert that the call raises an InvalidArgument with this message that names the argument."""
    with pytest.raises(moecomm.InvalidArgument, match=match) as error:
        call()
    assert argument in str(error.value), f"{name}: {error.value}"


@pytest.mark.parametrize("match", KINDS)
def test_refused_in_every_verb(match):
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    for name, arguments, call in verbs(buf):
        for argument, value in arguments.items():
            try:
                odd = KINDS[match](value)
            except (TypeError, RuntimeError):  # torch cannot make one with this dtype or shape
                continue
            if name == "moecomm" and not match.startswith(
                "storage"
            ):  # torch's dispatcher has replaced them before
                continue
            refused(match, lambda: call(**{**arguments, argument: odd}), f"{name}({argument}=)", argument)
    out = buf.dispatch(X, IDS, WEIGHTS)  # still usable
    torch.testing.assert_close(
        buf.combine(out.x, out.handle, topk_weights=out.topk_weights), X * WEIGHTS.sum(1, keepdim=True)
    )


def tried(transform, call, value):
    """Make the call inside a transform of one argument."""
    if transform == "dual":
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(value, torch.ones_like(value)))
    if transform == "dual under no_grad":
        with torch.no_grad(), forward_ad.dual_level():
            return call(forward_ad.make_dual(value, torch.ones_like(value)))
    if transform == "vmap":
        return torch.func.vmap(call)(value[None])
    if transform == "functionalize":
        return torch.func.functionalize(call)(value)
    first = lambda v: next(t for t in (v if isinstance(v, tuple) else (v,)))  # noqa: E731
    if transform == "jvp":
        return torch.func.jvp(lambda v: first(call(v)), (value,), (torch.ones_like(value),))
    return torch.func.grad(lambda v: first(call(v)).sum())(value)


TRANSFORMS = {
    "dual": "dual tensor of forward-mode AD",
    "dual under no_grad": "dual tensor",
    "vmap": "inside torch.func.vmap",
    "functionalize": "inside torch.func.functionalize",
    "jvp": "inside torch.func.grad, vjp, jvp",
    "grad": "inside torch.func.grad",
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused_by_name(transform):
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    for name, arguments, call in verbs(buf):
        for argument, value in arguments.items():
            if (
                not value.is_floating_point()
                or value.dtype == torch.float8_e4m3fn
                or name in ("rebalance", "Placement")
            ):
                continue
            if name == "moecomm" and transform not in (
                "vmap",
                "dual",
                "dual under no_grad",
            ):  # torch refuses it first: its operators have no rule for it
                continue
            refused(
                TRANSFORMS[transform],
                lambda: tried(transform, lambda v: call(**{**arguments, argument: v}), value),
                f"{name}({argument}=)",
                argument if name != "moecomm" else "",
            )


def test_plain_tensors_beside_transforms_pass():
    """A level of forward mode, or a transform of another tensor, does not affect tensors without tangents."""
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    want = X * WEIGHTS.sum(1, keepdim=True)

    def run():
        out = buf.dispatch(X, IDS, WEIGHTS)
        return buf.combine(out.x, out.handle, topk_weights=out.topk_weights)

    with forward_ad.dual_level():
        torch.testing.assert_close(run(), want)
        received, _ = buf.decode_dispatch(X, IDS, quant=None, return_hook=False)
        torch.testing.assert_close(
            buf.decode_combine(received.x, IDS, WEIGHTS, received.handle, return_hook=False)[0], want
        )
    torch.testing.assert_close(torch.func.grad(lambda v: (v * run()).sum())(torch.ones(8, 128)), want)


class Renamed(torch.Tensor):
    """A subclass with memory and the default operators."""


def test_tensors_with_memory_pass():
    """Parameters, subclasses without __torch_dispatch__ and awaited results of collectives are valid."""
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE, arena_bytes=1 << 20)
    want = X * WEIGHTS.sum(1, keepdim=True)

    def run(x, weights=WEIGHTS, ids=IDS):
        out = buf.dispatch(x, ids, weights)
        return buf.combine(out.x * 1, out.handle, topk_weights=out.topk_weights)

    for kind in (torch.nn.Parameter, lambda t: t.as_subclass(Renamed)):
        torch.testing.assert_close(run(kind(X.clone())).detach(), want)
        with torch.no_grad():
            torch.testing.assert_close(
                run(kind(X.clone()), kind(WEIGHTS.clone()), IDS.as_subclass(Renamed)), want
            )
    mesh()
    import torch.distributed._functional_collectives as collectives

    waiting = collectives.all_gather_tensor(X, 0, dist.group.WORLD)
    assert type(waiting) is collectives.AsyncCollectiveTensor
    torch.testing.assert_close(run(waiting), want)
    assert torch.equal(
        quant.quantize(collectives.all_gather_tensor(X, 0, dist.group.WORLD))[1], quant.quantize(X)[1]
    )
    x = X.clone().requires_grad_()
    run(collectives.all_gather_tensor_autograd(x, 0, dist.group.WORLD)).sum().backward()
    torch.testing.assert_close(x.grad, WEIGHTS.sum(1, keepdim=True).expand(8, 128))


def test_storage_that_ends_early():
    with pytest.raises(
        moecomm.InvalidArgument, match=r"x is a tensor .8, 128. whose storage holds 4092 bytes"
    ):
        quant.quantize(short(X))


def test_own_memory_under_a_fake_mode():
    """Under FakeTensorMode, results of decode and quant have no memory: refused, not written to address 0."""
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
    received, _ = buf.decode_dispatch(X, IDS, quant=None, return_hook=False)
    with FakeTensorMode():
        for call in (
            lambda: quant.quantize(X),
            lambda: buf.decode_combine(
                received.handle.rows, IDS, WEIGHTS, received.handle, return_hook=False
            ),
        ):
            with pytest.raises(moecomm.InvalidArgument, match="no memory"):
                call()


def test_refused_on_a_gpu(emulated):  # noqa: F811
    """The cuda world makes the same check."""

    def body(comm):
        buf = moecomm.Buffer(comm, **SHAPE)
        seen = []
        for kind in (
            "DTensor; expected a plain tensor, such as .*to_local",
            "FakeTensor, which has no memory",
            "storage holds 0 bytes",
        ):
            for call in (lambda t: buf.dispatch(t, IDS), lambda t: buf.decode_dispatch(t, IDS, quant=None)):
                with pytest.raises(moecomm.InvalidArgument, match=kind):
                    call(KINDS[kind](X))
                seen.append(kind)
        return len(seen)

    mesh()
    assert moecomm.run_local(body, 1, device="cuda:0") == [6]
