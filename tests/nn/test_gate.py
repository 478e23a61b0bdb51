"""Gates against an independent slow version, and the published configurations."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecomm
from moecomm import gate, presets


def slow_gate(logits, top_k, *, score, num_groups, top_groups, bias, normalize, scale):
    """Process one token after the other, in Python floats; return a list of (ids, weights)."""
    result = []
    for row in logits.tolist():
        if score == "sigmoid":
            affinity = [1 / (1 + math.exp(-v)) for v in row]
        else:
            top = max(row)
            total = sum(math.exp(v - top) for v in row)
            affinity = [math.exp(v - top) / total for v in row]
        biased = [a + b for a, b in zip(affinity, bias, strict=True)]
        size = len(row) // num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        terms = 2 if score == "sigmoid" else 1
        value = [sum(sorted((biased[e] for e in group), reverse=True)[:terms]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: -value[g])[:top_groups]
        allowed = [e for g in best for e in groups[g]]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        weights = [affinity[e] for e in chosen]
        if normalize:
            weights = [w / sum(weights) for w in weights]
        result.append((chosen, [w * scale for w in weights]))
    return result


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_gates_equal_the_slow_version(data):
    score = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    num_groups = data.draw(st.integers(1, 6))
    per_group = data.draw(st.integers(1, 6))
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, top_groups * per_group))
    normalize, scale = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 2.5]))
    tokens, experts = data.draw(st.integers(0, 7)), num_groups * per_group
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(tokens, experts, generator=g, dtype=torch.float64).float()
    bias = torch.randn(experts, generator=g) * 0.2 if score == "sigmoid" else torch.zeros(experts)
    how = dict(num_groups=num_groups, top_groups=top_groups, normalize=normalize, scale=scale)
    if score == "sigmoid":
        ids, weights = gate.sigmoid_gate(logits, top_k, bias=bias, **how)
    else:
        ids, weights = gate.softmax_gate(logits, top_k, **how)
    want = slow_gate(logits, top_k, score=score, bias=bias.tolist(), **how)
    assert ids.tolist() == [i for i, _ in want]
    torch.testing.assert_close(
        weights, torch.tensor([w for _, w in want]).view(tokens, top_k), rtol=1e-5, atol=1e-6
    )
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64


def test_bias_chooses_but_does_not_weigh():
    logits = torch.zeros(1, 4)
    ids, weights = gate.sigmoid_gate(logits, 2, bias=torch.tensor([0.0, 0.3, 0.0, 0.2]))
    assert ids.tolist() == [[1, 3]] and weights.tolist() == [[0.5, 0.5]]


def test_groups_limit_the_nodes_of_a_token():
    shape = presets.deepseek_v3
    logits = torch.randn(64, shape.num_experts, generator=torch.Generator().manual_seed(0))
    ids, weights = gate.sigmoid_gate(
        logits, shape.top_k, num_groups=shape.num_groups, top_groups=shape.top_groups, scale=shape.scale
    )
    nodes = ids // (shape.num_experts // shape.num_groups)
    assert max(len(set(row)) for row in nodes.tolist()) <= shape.top_groups
    torch.testing.assert_close(weights.sum(-1), torch.full((64,), shape.scale))


def test_gradient_reaches_the_logits_through_the_weights():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ids, weights = gate.sigmoid_gate(logits, 2)
    weights[:, 0].sum().backward()
    assert (logits.grad.abs().sum(1) > 0).all()
    assert not logits.grad[torch.ones(3, 6, dtype=torch.bool).scatter_(1, ids, False)].any()


def test_bias_update_balances_a_skewed_router():
    """Bias updates alone bring the load of every expert close to the mean."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2048, 16, generator=generator) + torch.linspace(-1, 1, 16)
    bias = torch.zeros(16)
    spread = []
    for _ in range(400):
        ids, _ = gate.sigmoid_gate(logits, 4, bias=bias)
        counts = gate.count_picks(ids, 16)
        assert counts.sum() == ids.numel()
        spread.append(float(counts.max() / counts.float().mean()))
        gate.update_bias(bias, counts, 0.002)
    assert spread[0] > 1.5 and spread[-1] < 1.1, (spread[0], spread[-1])
    assert gate.update_bias(torch.zeros(3), torch.tensor([5, 1, 3]), 0.5).tolist() == [-0.5, 0.5, 0.0]


def test_balance_loss_equals_its_definition():
    g = torch.Generator().manual_seed(2)
    batch, length, experts, top_k, alpha = 3, 5, 6, 2, 0.25
    affinities = torch.rand(batch, length, experts, generator=g, dtype=torch.float64, requires_grad=True)
    ids = affinities.detach().topk(top_k, -1).indices
    loss = 0.0
    for b in range(batch):
        for e in range(experts):
            picked = sum(e in ids[b, t].tolist() for t in range(length))
            mean = sum(affinities[b, t, e] / affinities[b, t].sum() for t in range(length)) / length
            loss = loss + alpha * experts / (top_k * length) * picked * mean / batch
    torch.testing.assert_close(gate.balance_loss(affinities, ids, alpha), loss)
    assert torch.autograd.gradcheck(lambda a: gate.balance_loss(a, ids, alpha), (affinities,))
    assert gate.count_picks(torch.tensor([[0, -1], [2, 0]]), 3).tolist() == [2, 0, 1]


def test_gate_module_is_the_function():
    module = gate.Gate(16, 8, 3, num_groups=4, top_groups=2, scale=2.5)
    module.bias.copy_(torch.randn(8) * 0.1)
    x = torch.randn(5, 16)
    ids, weights, affinities = module(x)
    want = gate.sigmoid_gate(x @ module.weight.T, 3, num_groups=4, top_groups=2, scale=2.5, bias=module.bias)
    assert torch.equal(ids, want[0])
    torch.testing.assert_close(weights, want[1])
    assert affinities.shape == (5, 8) and "bias" in module.state_dict()
    assert "bias" not in gate.Gate(16, 8, 3, score="softmax").state_dict()


@pytest.mark.parametrize(
    "how,match",
    [
        (dict(num_groups=3), "num_groups"),
        (dict(num_groups=4, top_groups=1, top_k=3), "top_groups"),
        (dict(top_k=9), "top_k"),
    ],
)
def test_bad_shapes_are_named(how, match):
    with pytest.raises(moecomm.InvalidArgument, match=match):
        gate.sigmoid_gate(torch.zeros(2, 8), how.pop("top_k", 2), **how)


def test_presets_are_the_published_shapes():
    p = presets
    v3 = p.deepseek_v3
    assert (v3.hidden, v3.num_experts, v3.top_k, v3.num_groups, v3.top_groups) == (7168, 256, 8, 8, 4)
    assert [
        (d.ranks, d.nodes, d.experts_per_rank)
        for d in (p.deepseek_v3_training, p.deepseek_v3_prefill, p.deepseek_v3_decode)
    ] == [(64, 8, 4), (32, 4, 9), (320, 40, 1)]
    for d in (p.deepseek_v3_training, p.deepseek_v3_prefill, p.deepseek_v3_decode):
        assert (
            d.experts % d.ranks == 0 and d.ranks % d.ranks_per_node == 0 and d.experts >= d.model.num_experts
        )
    for shape in (v for v in vars(p).values() if isinstance(v, p.ModelShape)):
        assert (
            shape.hidden % 128 == 0
            and shape.top_groups * shape.num_experts // shape.num_groups >= shape.top_k
        )


class Router(torch.nn.Module):
    """A router of another library: its bias is a buffer or a parameter."""

    def __init__(self, parameter):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8))
        if parameter:
            self.correction = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        else:
            self.register_buffer("correction", torch.randn(4))


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to("cpu", torch.bfloat16),
    "copy": lambda m: copy.deepcopy(m).bfloat16(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_bias_stays_float32(cast):
    """Casts of a model keep the balancing bias bit for bit, and cast its weight.

    This also holds for other routers after keep_float32.
    """
    model = torch.nn.ModuleList(
        [gate.Gate(8, 4, 1), Router(False), Router(True), gate.Gate(8, 4, 1, score="softmax")]
    )
    model[0].bias.normal_()
    assert gate.keep_float32(model, "correction") == 2 and gate.keep_float32(model, "nothing") == 0
    before = [model[0].bias.clone(), model[1].correction.clone(), model[2].correction.clone()]
    model = CASTS[cast](CASTS[cast](model))
    for have, want in zip([model[0].bias, model[1].correction, model[2].correction], before, strict=True):
        assert have.dtype == torch.float32 and torch.equal(have, want)
    assert model[0].weight.dtype == model[1].weight.dtype != torch.float32 and model[3].bias is None
    assert [name for name, _ in model[2].named_parameters()] == ["weight", "correction"]


def test_bias_keeps_moving_after_a_cast():
    model = gate.Gate(8, 4, 1).bfloat16()
    for _ in range(1500):
        model.update_bias(torch.tensor([0, 10, 10, 10]), 0.001)
    torch.testing.assert_close(model.bias, torch.tensor([1.5, -1.5, -1.5, -1.5]), rtol=1e-4, atol=0)
    with pytest.raises(moecomm.InvalidArgument, match=r"bias is torch.bfloat16.*float32 or float64"):
        gate.update_bias(model.bias.bfloat16(), torch.tensor([0, 10, 10, 10]), 0.001)


@pytest.mark.parametrize("assign", [False, True])
def test_bias_through_a_state_dict(assign):
    """Loading restores the saved bias, in float32 even if the checkpoint has another dtype."""
    first = torch.nn.ModuleList([gate.Gate(8, 4, 1), Router(False)]).bfloat16()
    first[0].bias.normal_()
    again = torch.nn.ModuleList([gate.Gate(8, 4, 1), Router(False)])
    gate.keep_float32(again, "correction")
    again.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(again[0].bias, first[0].bias)
    again.load_state_dict({k: v.bfloat16() for k, v in first.state_dict().items()}, assign=assign)
    assert again[0].bias.dtype == again[1].correction.dtype == torch.float32
    assert torch.equal(again[0].bias, first[0].bias.bfloat16().float())


def test_bias_is_made_on_another_device():
    """A model made on the meta device, cast there, and given memory later."""
    with torch.device("meta"):
        model = gate.Gate(8, 4, 1)
    model = model.bfloat16().to_empty(device="cpu")
    assert (
        model.bias.dtype == torch.float32
        and model.bias.device.type == "cpu"
        and model.weight.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 5, 4)])
def test_balance_loss_without_tokens(shape):
    """A rank without tokens has a loss of zero with a gradient."""
    affinities = torch.rand(shape, requires_grad=True)
    loss = gate.balance_loss(affinities, torch.zeros((*shape[:-1], 2), dtype=torch.int64), 1e-4)
    loss.backward()
    assert loss.item() == 0 and affinities.grad.shape == shape


def test_balance_loss_counts_beyond_bfloat16():
    """bfloat16 cannot count to 600: half-precision affinities are summed in float32."""
    affinities, ids = torch.full((600, 2), 0.5), torch.zeros(600, 1, dtype=torch.int64)
    want = gate.balance_loss(affinities, ids, 1.0)
    torch.testing.assert_close(gate.balance_loss(affinities.bfloat16(), ids, 1.0), want)


def test_gate_of_float64_tokens():
    """The choice is made in float64, which distinguishes two experts that are equal in float32. Weights are float32."""
    module = gate.Gate(2, 3, 1).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0], [1.0 + 1e-12, 0], [0, 0]], dtype=torch.float64))
    ids, weights, affinities = module(torch.tensor([[1.0, 0]], dtype=torch.float64))
    assert (ids.tolist(), weights.dtype, affinities.dtype) == ([[1]], torch.float32, torch.float64)
