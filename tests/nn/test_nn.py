"""The MoE layer: compared with a dense computation, compiled, and checkpoints between numbers of ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import assert_same

import moecomm
from moecomm.gate import Gate
from moecomm.grouped import grouped_mm, grouped_mm_into
from moecomm.nn import Experts, MoE

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 16, 8, 2
ROOT = Path(__file__).parents[2]


def dense(layer, state, x):
    """Compute the layer with all experts of a checkpoint, one token after the other."""
    ids, weights, _ = layer.gate(x)
    y = layer.shared_experts(x) if layer.shared_experts is not None else torch.zeros_like(x)
    rows = []
    for t in range(len(x)):
        total = y[t]
        for e, w in zip(ids[t].tolist(), weights[t], strict=True):
            gate, up, down = (state[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            total = total + w.to(x.dtype) * (down @ (torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])))
        rows.append(total)
    return torch.stack(rows) if rows else y


def checkpoint_of(seed, dtype):
    """Return the state of a whole layer, in the form of a single rank."""

    def make(comm):
        torch.manual_seed(seed)
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=1, dtype=dtype
        )
        return MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, 1, buffer).state_dict()

    return moecomm.run_local(make, 1)[0]


def make_layer(comm, state, dtype, **options):
    buffer = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=dtype)
    layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, 1, buffer, **options)
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("size,tokens", [(1, [5]), (4, [3, 0, 7, 16])])
@pytest.mark.parametrize(
    "options", [{}, {"expert_alignment": 4}, {"capacity": 64}], ids=["plain", "padded", "capacity"]
)
def test_layer_equals_dense_experts(size, tokens, options):
    """Output and all gradients in float64, and the same output without gradients (written in place)."""
    dtype = torch.float64
    state = checkpoint_of(1, dtype)
    xs = [torch.randn(t, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(t)) for t in tokens]

    def run(comm):
        layer = make_layer(comm, state, dtype, **options)
        x = xs[comm.rank].clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        with torch.no_grad():
            assert_same(layer(x), y.detach(), "without gradients")
        leaf = {k: v.clone().requires_grad_() for k, v in state.items() if v.is_floating_point()}
        x2 = xs[comm.rank].clone().requires_grad_()
        torch.testing.assert_close(y, dense(layer, leaf, x2), rtol=1e-5, atol=1e-6)  # the weights are float32
        return layer, x, leaf, x2

    def finish(results):
        # The dense gradients of the tokens of all ranks, per expert.
        layer = results[0][0]
        leaf = results[0][2]
        total = sum(dense(layer, leaf, x2).square().sum() for _, _, _, x2 in results)
        total.backward()
        for own, x, _, x2 in results:
            torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-6)
            for e in range(own.experts.count):
                want = leaf[f"experts.{own.experts.first + e}.down_proj.weight"].grad
                torch.testing.assert_close(
                    own.experts.down.grad[e],
                    torch.zeros_like(own.experts.down[e]) if want is None else want,
                    rtol=1e-5,
                    atol=1e-6,
                )
                names = [f"experts.{own.experts.first + e}.{n}_proj.weight" for n in ("gate", "up")]
                want = [
                    leaf[n].grad if leaf[n].grad is not None else torch.zeros_like(leaf[n]) for n in names
                ]
                torch.testing.assert_close(own.experts.gate_up.grad[e], torch.cat(want), rtol=1e-5, atol=1e-6)

    finish(moecomm.run_local(run, size))


def test_a_checkpoint_of_eight_ranks_loads_with_four_and_one():
    dtype = torch.float32

    def save(comm):
        torch.manual_seed(comm.rank)  # experts differ between ranks
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=4, dtype=dtype
        )
        layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, 0, buffer)
        state = layer.state_dict()
        assert (
            len([k for k in state if k.startswith("experts.")]) == 3
            and f"experts.{comm.rank}.up_proj.weight" in state
        )
        return {k: v.clone() for k, v in state.items()}

    parts = moecomm.run_local(save, 8)
    whole = {}
    for part in parts:
        whole.update({k: v for k, v in part.items() if k.startswith("experts.")})
    whole.update({k: v for k, v in parts[0].items() if k.startswith("gate.")})
    x = torch.randn(6, HIDDEN)

    def load(comm):
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=8, dtype=dtype
        )
        layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, 0, buffer)
        layer.load_state_dict(whole)
        for name, value in layer.state_dict().items():
            assert_same(value, whole[name], name)
        with pytest.raises(RuntimeError, match="size mismatch for experts"):
            layer.load_state_dict({k: v[:1] if "down_proj" in k else v for k, v in whole.items()})
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(parts[(comm.rank + 1) % comm.size * 2 % 8 if comm.size > 1 else 0])
        with torch.no_grad():
            return layer(x)

    four, one = moecomm.run_local(load, 4), moecomm.run_local(load, 1)
    torch.testing.assert_close(four[3], one[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grouped_mm(dtype):
    """torch's and moecomm's grouped_mm, with empty groups and trailing rows; moecomm's derivatives to second order."""
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 3, 3, 7])
    x, w = torch.randn(9, 16, generator=g).to(dtype), torch.randn(4, 16, 8, generator=g).to(dtype)
    x[7:] = 0
    want = torch.cat([x[:3] @ w[1], x[3:7] @ w[3], torch.zeros(2, 8, dtype=dtype)])
    torch.testing.assert_close(grouped_mm(x, w, ends), want)
    torch.testing.assert_close(torch.ops.moecomm.grouped_mm(x, w, ends), want)
    into = torch.zeros(9, 8, dtype=dtype)
    torch.testing.assert_close(grouped_mm_into(into, x, w, ends), want)
    assert grouped_mm(x[:0], w, torch.zeros(4, dtype=torch.int64)).shape == (0, 8)
    if dtype == torch.float64:
        leaves = (x.requires_grad_(), w.requires_grad_())
        mm = lambda a, b: torch.ops.moecomm.grouped_mm(a, b, ends)[:7]  # noqa: E731
        assert torch.autograd.gradcheck(mm, leaves) and torch.autograd.gradgradcheck(mm, leaves)
        torch.library.opcheck(torch.ops.moecomm.grouped_mm.default, (*leaves, ends))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize(
    "backend,dtype",
    [("aot_eager", torch.float32), ("aot_eager", torch.bfloat16), ("inductor", torch.float32)],
)
def test_compiled_layer_equals_eager(backend, dtype):
    """torch.compile(fullgraph=True, dynamic=False) in capacity mode, forward and backward, compiled once."""
    state = checkpoint_of(2, dtype)
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(comm):
        layer = make_layer(comm, state, dtype, capacity=32)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)

        def gradients(f, seed):
            layer.zero_grad()
            leaf = (x * (1 + seed)).requires_grad_()
            y = f(leaf)
            y.float().square().sum().backward()
            return [y.detach(), leaf.grad, *[p.grad.clone() for p in layer.parameters()]]

        close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        for seed in range(3):
            for got, want in zip(gradients(compiled, seed), gradients(layer, seed), strict=True):
                torch.testing.assert_close(got, want, **close)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), **close)

    moecomm.run_local(run, 1)


def test_compiled_layers_over_processes():
    """Two compiled layers on two ranks with different numbers of tokens: both exchange rows in forward and backward."""
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        "2",
        sys.executable,
        str(ROOT / "tests" / "support" / "compile_worker.py"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        check=False,
    )
    differences = [float(d) for d in re.findall(r"differ by (\S+)", done.stdout)]
    assert done.returncode == 0 and len(differences) == 2 and max(differences) < 1e-5, (
        done.stdout + done.stderr[-3000:]
    )


def test_without_capacity_only_dispatch_breaks_the_graph():
    """The number of rows is data: it causes the only graph break, which a setting of torch removes."""
    state = checkpoint_of(4, torch.float32)

    def run(comm):
        layer = make_layer(comm, state, torch.float32)
        x = torch.randn(5, HIDDEN, requires_grad=True)
        torch._dynamo.reset()
        found = torch._dynamo.explain(layer)(x)
        assert found.break_reasons and all(
            "moecomm.dispatch" in str(r.reason) for r in found.break_reasons
        ), found.break_reasons
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()

    moecomm.run_local(run, 1)


def test_bad_buffers_are_named():
    def run(comm):
        buffer = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=4, dtype=torch.float32
        )
        with pytest.raises(
            moecomm.InvalidArgument, match="buffer is for top_k = 2; expected a Buffer for top_k = 3"
        ):
            MoE(HIDDEN, INTERMEDIATE, EXPERTS, 3, 0, buffer)
        with pytest.raises(moecomm.InvalidArgument, match="buffer is None"):
            MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
        layer = MoE(
            HIDDEN,
            INTERMEDIATE,
            EXPERTS,
            TOP_K,
            2,
            buffer,
            gate=Gate(HIDDEN, EXPERTS, TOP_K, score="softmax"),
        )
        y, routing = layer(torch.randn(2, 2, HIDDEN), with_routing=True)
        assert y.shape == (2, 2, HIDDEN) and routing.topk_ids.shape == (4, TOP_K)
        assert isinstance(layer.experts, Experts) and "experts 0..7" in repr(layer)

    moecomm.run_local(run, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_layer_alone(dtype, given):
    """Tokens have the dtype of autocast; gate, experts and exchange compute as without it."""

    def run(comm):
        buffer = moecomm.Buffer(
            comm, hidden=32, num_experts=4, top_k=2, max_tokens=8, dtype=dtype, arena_bytes=1 << 22
        )
        layer, x = MoE(32, 16, 4, 2, 1, buffer), torch.randn(4, 32).to(given)
        want, routing = layer(x.to(dtype), with_routing=True)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, theirs = layer(leaf, with_routing=True)
            gate = layer.gate(x.to(dtype))
        assert_same(got.detach(), want.detach(), "y")
        for a, b, c in zip(routing, theirs, gate, strict=True):
            assert_same(b.detach(), a.detach(), "routing")
            assert_same(c.detach(), a.detach(), "routing of the gate alone")
        got.float().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == given

    moecomm.run_local(run, 1)
