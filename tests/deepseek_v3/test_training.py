"""The parts of training in examples/deepseek_v3: schedule, stages, FP8 products, needles, checkpoints."""

import random
import threading
from dataclasses import replace

import pytest
import torch

import moecomm
from examples.deepseek_v3 import schedule
from examples.deepseek_v3.config import TINY
from examples.deepseek_v3.model import Model
from examples.deepseek_v3.moe import make_buffer
from examples.deepseek_v3.needle import SIZE, Needles, measure
from examples.deepseek_v3.precision import Fp8Linear, LowMoE, promoted_product
from examples.deepseek_v3.same_curve import difference
from examples.deepseek_v3.schedule import Schedule, batch_size, bias_speed, learning_rate, mtp_weight
from examples.deepseek_v3.stages import run
from moecomm import quant
from moecomm.errors import InvalidArgument


def test_schedule_as_published(tmp_path):
    """All numbers of section 4.2, at their switches and next to them."""
    s, t = Schedule(), 1e12
    assert learning_rate(0, s) == 0 and learning_rate(s.warmup / 2, s) == pytest.approx(1.1e-4)
    assert learning_rate(s.warmup, s) == learning_rate(9.999 * t, s) == 2.2e-4
    assert learning_rate(12.15 * t, s) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert learning_rate(14.2999 * t, s) == pytest.approx(2.2e-5, rel=1e-4)
    assert learning_rate(14.3 * t + 332e9, s) == 2.2e-5 and learning_rate(14.3 * t + 334e9, s) == 7.3e-6
    assert batch_size(0, s) == 3072 and batch_size(469e9 / 2, s) == 9216 and batch_size(14 * t, s) == 15360
    assert bias_speed(14.2 * t, s) == 0.001 and bias_speed(14.4 * t, s) == 0.0
    assert mtp_weight(9 * t, s) == 0.3 and mtp_weight(11 * t, s) == 0.1
    assert (s.alpha, s.clip, s.betas, s.weight_decay) == (1e-4, 1.0, (0.9, 0.95), 0.1)
    small = s.scaled(14.8e6, peak=1.0)
    for at in (0.5, 9.0, 12.0, 14.5, 14.7):
        assert learning_rate(at * 1e6, replace(small, peak=2.2e-4)) == pytest.approx(learning_rate(at * t, s))
    with pytest.raises(InvalidArgument, match="total is 0"):
        s.scaled(0)
    schedule.plot(s, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("overlap,recompute", [(True, False), (False, True), (True, True)])
def test_stages_equal_the_model(overlap, recompute):
    """Logits, MTP's logits and all gradients; a rank without sequences, and halves of different sizes."""
    ids = torch.randint(64, (5, 9))

    def both(comm):
        mine = ids[: 5 if comm.rank == 0 else 0]
        model = Model(TINY, make_buffer(comm, TINY, 64, dispatches=8)).initialize(1)
        out = model(mine)
        drafts = model.predict_next(out.hidden[:, :-1], mine[:, 1:]).logits
        (out.logits.square().sum() + drafts.square().sum()).backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        flows = run(model, mine, overlap=overlap, recompute=recompute)
        assert len(flows) == 1 + overlap and len(flows[0].routings) == TINY.moe_layers
        torch.testing.assert_close(torch.cat([f.logits for f in flows]), out.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([f.drafts for f in flows]), drafts, rtol=1e-4, atol=1e-5)
        sum(f.logits.square().sum() + f.drafts.square().sum() for f in flows).backward()
        for name, parameter in model.named_parameters():
            if name in want:
                scale = float(want[name].abs().max())
                torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)

    moecomm.run_local(both, 2)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_fp8_products(rows):
    """Products equal those of the dequantized codes, and gradients are within FP8 precision; an expert has no rows."""
    x = torch.randn(rows, 256).bfloat16().requires_grad_()
    w = (torch.randn(3, 192, 256) * 0.1).requires_grad_()
    counts = torch.tensor([rows // 3, 0, rows - rows // 3])
    y = Fp8Linear.apply(x, w, counts)
    dy = torch.randn(rows, 192).bfloat16()
    y.backward(dy)
    expert = torch.arange(3).repeat_interleave(counts)
    want = torch.einsum("nk,nmk->nm", x.detach().float(), w.detach()[expert])
    dw = torch.zeros_like(w)
    for i in range(3):
        dw[i] = dy[expert == i].float().T @ x.detach()[expert == i].float()
    dx = torch.einsum("nm,nmk->nk", dy.float(), w.detach()[expert])
    for got, exact in ((y.detach(), want), (x.grad, dx), (w.grad, dw)):
        if exact.numel() and rows:
            error = (got.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert 0.001 < float(error) < 0.06, float(error)
        else:
            assert not got.any()
    if rows:
        (codes, scales), (w_codes, w_scales) = (
            quant.quantize(x.detach()),
            quant.quantize(w[0].detach(), tile=(128, 128)),
        )
        exact = quant.dequantize(codes, scales, dtype=torch.float32) @ (
            quant.dequantize(w_codes, w_scales, tile=(128, 128), dtype=torch.float32).T
        )
        torch.testing.assert_close(
            promoted_product(codes, scales, w_codes, w_scales), exact, rtol=1e-4, atol=1e-3
        )


def test_fp8_dispatch_overlaps():
    """A rank goes on before its peer has called dispatch. Gradients equal those of a dispatch without overlap."""
    wide = replace(TINY, hidden=128)
    first, second = torch.randn(2, 6, 128)
    started = threading.Event()

    def both(comm):
        layer = LowMoE(wide, make_buffer(comm, wide, 16, dtype=torch.bfloat16, dispatches=6), fp8=True)
        for i, p in enumerate(layer.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))

        def gradients(overlap):
            inputs = [x.clone().requires_grad_() for x in (first, second)]
            routings = [layer.gate(x) for x in inputs]
            if overlap and comm.rank:
                assert started.wait(20)
            outs, pending = [], []
            for x, routing in zip(inputs, routings, strict=True):
                pending.append(layer.start_dispatch(x, *routing[:2]))
                if not overlap:
                    outs.append(pending.pop().wait())
            started.set()
            outs += [p.wait() for p in pending]
            rows = [layer.experts(out.x, out.rows_per_expert) for out in outs]
            ys = [
                layer.buffer.combine(r, out.handle, topk_weights=out.topk_weights)
                for r, out in zip(rows, outs, strict=True)
            ]
            sum(y.float().square().sum() for y in ys).backward()
            return [*ys, *(x.grad for x in inputs)]

        for got, want in zip(gradients(overlap=True), gradients(overlap=False), strict=True):
            assert want.any() and torch.equal(got, want)

    moecomm.run_local(both, 2)


class Oracle(torch.nn.Module):
    """A perfect model that forgets secrets more than `reach` tokens before the end."""

    def __init__(self, marker, reach):
        super().__init__()
        self.marker, self.reach = marker, reach

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 100)
        for row, scores in zip(ids.tolist(), logits, strict=True):
            begin, length = row.index(self.marker), len(row)
            if begin >= length - self.reach:
                for i in range(SIZE - 1):
                    scores[length - SIZE + i, row[begin + 1 + i]] = 1
        return type("Out", (), {"logits": logits})


def test_needles_are_hidden_and_found():
    """The depth is correct, words of secrets occur only once, and the grid shows the found ones, on any ranks."""
    needles = Needles(marker=9, filler=0, kinds=torch.arange(10, 34).view(3, 8))
    hay = torch.randint(100, (64,))
    for depth, begin in ((0.0, 0), (0.5, 28), (1.0, 56), (None, None)):
        ids, answers = needles.hide(hay, random.Random(1), depth)
        assert answers.nonzero().flatten().tolist() == [61, 62, 63] and int(ids[60]) == 9
        assert torch.equal(ids[ids.tolist().index(9) :][:4], ids[60:])
        assert int(((ids >= 9) & (ids < 34)).sum()) == 2 * SIZE
        assert begin is None or ids.tolist().index(9) == begin
        same = (ids == hay) | (ids == 0)
        assert int((~same).sum()) <= 2 * SIZE
    with pytest.raises(InvalidArgument, match="haystack has 7"):
        needles.hide(hay[:7], random.Random(1))
    text = torch.randint(100, (300,))
    everything = measure(Oracle(9, 10**9), needles, text, [32, 256], [0.0, 1.0], 3)
    assert everything.found == [[1.0, 1.0], [1.0, 1.0]] and everything.at(10**6) == 1.0
    near = measure(Oracle(9, 40), needles, text, [32, 256], [0.0, 1.0], 3)
    assert near.found == [[1.0, 1.0], [0.0, 1.0]] and near.at(255) == 1.0 and near.at(256) == 0.5
    with pytest.raises(InvalidArgument, match="text has 300"):
        measure(Oracle(9, 9), needles, text, [301], [0.0], 1)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    checkpoint = pytest.importorskip(
        "examples.deepseek_v3.checkpoint", reason="safetensors is not installed", exc_type=ImportError
    )
    model = Model(TINY)
    with pytest.raises(InvalidArgument, match=r"no index\.json"):
        checkpoint.load(tmp_path, model)

    def save(comm):
        model = Model(TINY, make_buffer(comm, TINY, 4)).initialize(5)
        checkpoint.save(tmp_path, comm, model, torch.optim.AdamW(model.parameters()), {"a": 1})

    moecomm.run_local(save, 2)
    assert checkpoint.load(tmp_path, model) == {"a": 1}
    assert all(
        torch.equal(v, model.state_dict()[k]) for k, v in Model(TINY).initialize(5).state_dict().items()
    )
    with pytest.raises(InvalidArgument, match="has shape"):
        checkpoint.load(tmp_path, Model(replace(TINY, vocab_size=65)))
    with pytest.raises(InvalidArgument, match=r"has no (weight|buffer)/layers\.3"):
        checkpoint.load(tmp_path, Model(replace(TINY, layers=4, mtp=True)))


def test_curves_that_differ():
    """The difference is the largest over all steps; other steps and missing values are never equal."""
    curve = [{"loss": 2.0}, {"loss": None}, {"loss": 4.0}]
    assert difference(curve, curve, "loss") == 0
    assert difference([*curve[:2], {"loss": 5.0}], curve, "loss") == 0.25
    assert difference(curve[:2], curve, "loss") == float("inf")
    assert difference([curve[0], {"loss": 1.0}, curve[2]], curve, "loss") == float("inf")
