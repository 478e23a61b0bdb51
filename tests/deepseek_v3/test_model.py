"""The model of examples/deepseek_v3: compared with transformers; cached and absorbed forms, experts on ranks, MTP."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import moecomm
from examples.deepseek_v3.cache import Cache
from examples.deepseek_v3.config import PUBLISHED, TINY, Config, Yarn
from examples.deepseek_v3.model import Model
from examples.deepseek_v3.moe import make_buffer
from moecomm.errors import CapacityExceeded, InvalidArgument

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".venv-transformers" / "bin" / "python"
PYTHON = sys.executable if find_spec("transformers") else str(OWN) if OWN.exists() else None


def make(config=TINY, seed=1, **more):
    model = Model(config, **more).initialize(seed)
    with torch.no_grad():  # random, so that a missing weight or bias is detected
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()))
            if name.endswith("gate.bias"):
                tensor.copy_(torch.linspace(-0.1, 0.1, tensor.numel()))
    return model


@pytest.mark.skipif(PYTHON is None, reason="transformers >= 5.23 is not installed: make transformers")
def test_equals_transformers():
    """Logits, all gradients, and cached decoding in the absorbed form; without and with YaRN."""
    done = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "support" / "deepseek_v3_worker.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(r"logits (\S+) grads (\S+) decoded (\S+) of (\S+)", done.stdout)
    assert len(found) == 2, done.stdout
    for logits, grads, decoded, largest in (tuple(map(float, f)) for f in found):
        assert logits < 5e-5 and decoded < 5e-5 and grads < 5e-6 < largest, done.stdout


@pytest.mark.parametrize("yarn", [None, Yarn(original=8)], ids=["plain", "yarn"])
@pytest.mark.parametrize("scaled", [False, True])
def test_cached_and_absorbed_equal_the_plain_form(yarn, scaled):
    """Requests of different lengths in any slots, prefilled with padding, then decoded token by token."""
    model = make(replace(TINY, yarn=yarn, bottleneck_scale=scaled))
    lengths, slots = torch.tensor([7, 1, 12]), torch.tensor([4, 0, 2])
    ids = torch.randint(64, (3, 20))
    with torch.no_grad():
        want = model(ids).logits
        for absorbed in (False, True):
            cache = Cache(model.config, 5, 20)
            cache.data.fill_(float("nan"))  # unwritten entries must not be read
            positions = torch.arange(12).expand(3, 12)
            positions = torch.where(positions < lengths[:, None], positions, -1)
            got = model(ids[:, :12], cache=cache, slots=slots, positions=positions, absorbed=absorbed).logits
            real = positions >= 0
            torch.testing.assert_close(got[real], want[:, :12][real], rtol=1e-4, atol=2e-5)
            assert torch.equal(cache.lengths[slots], lengths)
            for _ in range(8):
                at = cache.lengths[slots]
                step = model(ids.gather(1, at[:, None]), cache=cache, slots=slots, absorbed=absorbed).logits[
                    :, 0
                ]
                expected = want[torch.arange(3), at]
                torch.testing.assert_close(step, expected, rtol=1e-4, atol=2e-5)
            assert torch.equal(cache.lengths[slots], lengths + 8) and int(cache.lengths[1]) == 0


def test_float64_is_float64_throughout():
    """Absorbed decoding from a cache agrees with the plain form to 1e-12, not only to the precision of float32."""
    model, ids = make().double(), torch.randint(64, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        cache = Cache(model.config, 2, 9, torch.float64)
        steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(9)]
        no_rows = model(
            ids[:0, :1], cache=cache, slots=torch.zeros(0, dtype=torch.int64), positions=ids[:0, :1]
        )
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-12, atol=1e-12)
    assert no_rows.logits.shape == (0, 1, 64)


def test_mtp_from_a_cache_equals_the_plain_form():
    """The module must not see the token that it predicts."""
    model, ids = make(), torch.randint(64, (2, 12))
    with torch.no_grad():
        hidden = model(ids).hidden
        want = model.predict_next(hidden[:, :-1], ids[:, 1:]).logits
        other = ids.clone()
        other[:, 8:] = (other[:, 8:] + 1) % 64
        changed = model.predict_next(model(other).hidden[:, :-1], other[:, 1:]).logits
        torch.testing.assert_close(changed[:, :7], want[:, :7], rtol=1e-4, atol=2e-5)
        assert float((changed[:, 7] - want[:, 7]).abs().max()) > 1e-2
        cache = Cache(model.config, 2, 12)
        model(ids[:, :6], cache=cache)
        positions = torch.arange(11).expand(2, 11)
        got = [
            model.predict_next(
                hidden[:, a:b],
                ids[:, a + 1 : b + 1],
                cache=cache,
                slots=torch.arange(2),
                positions=positions[:, a:b],
            ).logits
            for a, b in ((0, 6), (6, 7), (7, 11))
        ]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=2e-5)
    assert cache.lengths.tolist() == [6, 6]


@pytest.mark.parametrize("ranks,per_node", [(2, 2), (4, 2)])
def test_ranks_equal_one_process(ranks, per_node):
    """Logits and gradients, with different numbers of sequences per rank, and none on the last."""
    ids = torch.randint(64, (5, 9))
    alone = make()
    out = alone(ids)
    drafted = alone.predict_next(out.hidden[:, :-1], ids[:, 1:])
    (out.logits.square().sum() + drafted.logits.square().sum()).backward()
    state = alone.state_dict()
    want = {name: p.grad for name, p in alone.named_parameters()}

    def run(comm):
        shares = [5, 0] if comm.size == 2 else [2, 1, 2, 0]
        first = sum(shares[: comm.rank])
        mine = ids[first : first + shares[comm.rank]]
        model = Model(TINY, make_buffer(comm, TINY, 64)).initialize(2)
        model.load_state_dict(state)
        got = model(mine)
        torch.testing.assert_close(
            got.logits, out.logits[first : first + len(mine)].detach(), rtol=1e-4, atol=2e-5
        )
        second = model.predict_next(got.hidden[:, :-1], mine[:, 1:])
        (got.logits.square().sum() + second.logits.square().sum()).backward()
        experts = {}
        for name, module in model.named_modules():
            if isinstance(module, moecomm.nn.Experts):
                for kind in ("gate_up", "down"):
                    part = want[f"{name}.{kind}"][module.first : module.first + module.count]
                    torch.testing.assert_close(getattr(module, kind).grad, part, rtol=1e-3, atol=1e-3)
                    experts[f"{name}.{kind}"] = True
        return {n: p.grad for n, p in model.named_parameters() if n not in experts}

    parts = moecomm.run_local(run, ranks, ranks_per_node=per_node)
    for name in parts[0]:
        total = sum(p[name] for p in parts if p[name] is not None)
        torch.testing.assert_close(total, want[name], rtol=1e-3, atol=1e-3 * float(want[name].abs().max()))


def test_initial_weights_do_not_depend_on_the_ranks():
    whole = Model(TINY).initialize(3).state_dict()
    assert abs(float(whole["layers.1.mlp.experts.7.up_proj.weight"].std()) / TINY.init_std - 1) < 0.1

    def run(comm):
        return Model(TINY, make_buffer(comm, TINY, 4)).initialize(3).state_dict()

    seen = set()
    for part in moecomm.run_local(run, 4):
        seen |= set(part)
        assert all(torch.equal(whole[name], value) for name, value in part.items())
    assert seen == set(whole)


def test_empty_and_padded_calls():
    """No rows, no tokens, and a row of only padding."""
    model = make()
    with torch.no_grad():
        assert model(torch.zeros(0, 5, dtype=torch.int64)).logits.shape == (0, 5, 64)
        cache = Cache(model.config, 2, 8)
        ids, positions = torch.randint(64, (2, 3)), torch.tensor([[0, 1, 2], [-1, -1, -1]])
        got = model(ids, cache=cache, positions=positions)
        assert cache.lengths.tolist() == [3, 0] and bool(got.logits[0].isfinite().all())
        torch.testing.assert_close(got.logits[:1], model(ids[:1]).logits, rtol=1e-4, atol=2e-5)
        assert all(len(r.topk_ids) == 3 for r in got.routings), "padding was sent to experts"


def test_refusals():
    """Each error names the argument."""
    model, ids = make(replace(TINY, mtp=False)), torch.zeros(1, 4, dtype=torch.int64)
    cache = Cache(model.config, 1, 3)
    for wrong, text in (
        (lambda: model(ids, cache=cache), "positions has 3; expected less than 3"),
        (lambda: model(ids, positions=torch.zeros(1, 3, dtype=torch.int64)), "positions has shape"),
        (lambda: model(ids, cache=cache, slots=torch.zeros(2, dtype=torch.int64)), "slots has shape"),
        (lambda: model.predict_next(torch.zeros(1, 4, 32), ids), "no MTP module"),
        (lambda: make().predict_next(torch.zeros(1, 4, 32), ids, cache=cache), "positions is None"),
        (lambda: Cache(model.config, 1, 3, data=torch.zeros(1)), "data has shape"),
        (lambda: cache.free(0), "slot is 0"),
        (lambda: Config(rope=3), "rope is 3"),
        (lambda: Config(dense_layers=9), "dense_layers is 9"),
        (lambda: Config(num_groups=3), "num_groups is 3"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            wrong()
    cache.allocate()
    with pytest.raises(CapacityExceeded):
        cache.allocate()


def test_published_sizes():
    """671 billion parameters without MTP, 37 billion of them active per token, as published."""
    with torch.device("meta"):
        block = Model(replace(PUBLISHED, layers=1, dense_layers=1, num_experts=8, num_groups=8, mtp=False))
    c = PUBLISHED
    expert = 3 * c.hidden * c.expert_intermediate
    attention = sum(p.numel() for p in block.layers[0].self_attn.parameters()) + 2 * c.hidden
    dense = attention + 3 * c.hidden * c.intermediate
    outside = 2 * c.vocab_size * c.hidden + c.hidden

    def total(routed):
        return (
            outside
            + c.dense_layers * dense
            + (c.layers - c.dense_layers)
            * (attention + (routed + c.shared_experts) * expert + c.num_experts * (c.hidden + 1))
        )

    assert round(total(c.num_experts) / 1e9) == 671
    assert 36e9 < total(c.top_k) < 38e9
