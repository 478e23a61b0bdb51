"""The planner: questions by name, predictions that follow the bytes, consistent reports."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moecomm
from moecomm import __main__ as command
from moecomm import presets
from moecomm.planner import ask, make_plan, predict
from moecomm.planner.question import route


def test_published_deployments_are_found():
    decode = ask("deepseek-v3", "h800", 320, 128)
    assert (decode.slots, decode.top_k, decode.decode, decode.nodes) == (
        320,
        9,
        True,
        40,
    ) and decode.shared_is_routed
    prefill = ask("deepseek-v3", "h800", 32, 4096)
    assert (prefill.slots, prefill.top_k, prefill.decode, prefill.nodes, prefill.top_groups) == (
        288,
        8,
        False,
        4,
        4,
    )


@pytest.mark.parametrize(
    "wrong,said",
    [
        (dict(model="gpt-9"), "model is 'gpt-9'; expected one of deepseek-v2-lite"),
        (dict(cluster="abacus"), "cluster is 'abacus'"),
        (dict(ranks=0), "ep is 0"),
        (dict(tokens=0), "tokens is 0"),
        (dict(slots_per_rank=1, ranks=64), "slots_per_rank is 1"),
    ],
)
def test_errors(wrong, said):
    with pytest.raises(moecomm.InvalidArgument, match=said.replace("(", r"\(")):
        ask(**{**dict(model="deepseek-v3", cluster="h800", ranks=32, tokens=16), **wrong})
    with pytest.raises(moecomm.InvalidArgument, match="routing is 'nowhere'"):
        predict(ask("deepseek-v3", "h800", 8, 4, routing="nowhere"))


def test_a_wrong_argument_is_told_like_one(capsys):
    """Also by the commands: their usage, the error and the expectation, without a traceback."""
    with pytest.raises(SystemExit) as ended:
        command.main(["plan", "--model", "deepseek-v3", "--cluster", "abacus", "--ep", "8", "--tokens", "4"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and "usage: python -m moecomm plan" in said
        and "cluster is 'abacus'; expected one of" in said
    )


def test_routing_keeps_the_node_limit():
    """With as many groups as nodes and no copies, a token reaches at most M nodes."""
    for limit in (1, 2, 4):
        q = ask("deepseek-v3", "h800", 64, 16, decode=False, top_groups=limit, routing="zipf")
        ids = route(q)
        assert ids.shape == (64, 16, 8) and ids.min() >= 0 and ids.max() < q.slots
        nodes = ids // (q.slots // q.nodes)
        assert max(len(set(t.tolist())) for t in nodes.view(-1, 8)) == limit


def test_copies_share_the_load():
    """Busy experts get the spare slots: the busiest rank of a skewed routing has less load than without them."""
    few = ask("deepseek-v3", "h800", 32, 64, decode=False, routing="zipf", slots_per_rank=8)
    many = ask("deepseek-v3", "h800", 32, 64, decode=False, routing="zipf", slots_per_rank=9)

    def busiest(q):
        return np.bincount(route(q).flatten() // (q.slots // q.ranks), minlength=q.ranks).max()

    assert busiest(many) < 0.8 * busiest(few)
    assert not any(len(set(t.tolist())) < 8 for t in route(many).view(-1, 8))


def test_more_bytes_take_longer():
    q = ask("deepseek-v3", "h800", 16, 256, decode=False)
    fp8, bf16 = predict(q), predict(q.varied(quant=None))
    assert bf16.dispatch_slowest_us > fp8.dispatch_slowest_us and bf16.rail_bytes > fp8.rail_bytes
    assert (
        bf16.buffer_bytes
        == fp8.buffer_bytes
        == moecomm.Buffer.size_hint(
            type("Comm", (), dict(rank=0, size=16, ranks_per_node=8, num_nodes=2)),
            hidden=7168,
            num_experts=256,
            top_k=8,
            max_tokens=256,
        )
    )
    assert 0 < fp8.hottest_share <= 1


def recorded(path):
    """Record one dispatch of two ranks with the gate of deepseek-v2-lite; return its picks by rank."""
    shape = presets.deepseek_v2_lite
    ids = [torch.rand(6, shape.num_experts).topk(shape.top_k).indices for _ in range(2)]

    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=64, num_experts=shape.num_experts, top_k=shape.top_k, max_tokens=6, record=path
        )
        buf.dispatch(torch.zeros(6, 64).bfloat16(), ids[comm.rank])
        comm.barrier()
        buf.close()

    moecomm.run_local(main, 2)
    return ids


def test_recorded_routing(tmp_path):
    ids = recorded(tmp_path)
    q = ask("deepseek-v2-lite", "h100", 4, 3, routing=str(tmp_path))
    assert torch.equal(route(q).view(12, -1), torch.cat(ids))
    with pytest.raises(moecomm.InvalidArgument, match="has top-6 of 64 experts; expected top-8 of 256"):
        predict(ask("deepseek-v3", "h100", 4, 3, routing=str(tmp_path)))


def test_plan_and_reports(tmp_path, capsys):
    page = tmp_path / "plan.html"
    options = [
        "plan",
        "--model",
        "deepseek-v2-lite",
        "--cluster",
        "h100",
        "--ep",
        "16",
        "--tokens",
        "4",
        "--slo-ms",
        "50",
        "--attention-us",
        "30",
    ]
    assert command.main([*options, "--json", "--html", str(page)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["sweeps"]) == {"sms", "node_limit", "precision", "ranks", "tokens"}
    p = said["prediction"]
    communication = p["dispatch_slowest_us"] + p["combine_slowest_us"]
    assert said["step_ms"] == pytest.approx(2 * 61 * communication / 1e3)
    assert said["tokens_per_second"]["rank"] == pytest.approx(8 * said["tokens_per_second"]["request"])
    assert said["hidden_share"] == {"30.0": pytest.approx(min(1, 30 / communication))}
    assert said["enough_sms"] in [s["value"] for s in said["sweeps"]["sms"]]
    text = page.read_text()
    assert text.count("<svg") == 5 and "http://" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert command.main([*options, "--quick"]) == 0
    assert "tokens/s" in capsys.readouterr().out


SMALL = ("--model", "deepseek-v2-lite", "--cluster", "h100", "--ep", "8", "--tokens", "4")


def plan(*words, stderr=subprocess.PIPE):
    """Start `python -m moecomm plan` on a small question."""
    return subprocess.Popen(
        [sys.executable, "-m", "moecomm", "plan", *SMALL, *words],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def answer(process):
    """Return (stdout, stderr) of a process that must succeed."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, f"{out}\n{err}"
    return out, err


@pytest.mark.parametrize("routing", ["zipf", "recorded"])
def test_command_line(tmp_path, routing):
    """Valid JSON only, a page without external resources, and the bound of a step.

    Without a terminal there is no progress bar.
    """
    if routing == "recorded":
        recorded(tmp_path / "trace")
        routing = str(tmp_path / "trace")
    out, err = answer(
        plan("--routing", routing, "--slo-ms", "12", "--json", "--html", str(tmp_path / "plan.html"))
    )
    assert err == ""
    said = json.loads(out)
    assert (said["question"]["routing"], said["question"]["ranks"], said["slo_ms"]) == (routing, 8, 12.0)
    steps = {
        s["value"]: 2 * said["layers"] * (s["dispatch_slowest_us"] + s["combine_slowest_us"]) / 1e3
        for s in said["sweeps"]["tokens"]
    }
    assert min(steps.values()) < 12 < max(steps.values()), f"a bound that does not bind: {steps}"
    assert said["tokens_within_slo"] == max(tokens for tokens, ms in steps.items() if ms <= 12)
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 5 and f"12 ms per step: up to {said['tokens_within_slo']} tokens" in page
    assert re.findall(r"(?:src|href|action|data)\s*=\s*[\"']?(?!#)[^\"'\s>]+", page) == [], (
        "it refers to something outside"
    )
    assert (
        re.findall(r"<(?:script|link|img|iframe|object|embed|base)\b|@import|url\(\s*[\"']?(?!#)", page) == []
    ), "it loads something"


def test_routing_matters(capsys):
    most = {}
    for routing in ("uniform", "zipf"):
        assert command.main(["plan", *SMALL, "--quick", "--json", "--routing", routing]) == 0
        most[routing] = json.loads(capsys.readouterr().out)["prediction"]["node_bytes_most"]
    assert most["zipf"] > most["uniform"], "a skewed routing loads some ranks more"


def test_progress_bar_is_for_terminals():
    """On a pseudo-terminal the bar is shown and removed; the printed output is the same as without it."""
    words = ("--routing", "zipf")
    ours, its = pty.openpty()
    process = plan(*words, stderr=its)
    os.close(its)
    shown, reading = b"", True
    while reading:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux reports a terminal without readers like this
            piece = b""
        shown, reading = shown + piece, piece != b""
    os.close(ours)
    out, _ = answer(process)
    bars = re.findall(r"\r\x1b\[K\[(#*) *\] (\d+)/(\d+) ([^\r]*)", shown.decode())
    assert bars[0][3] == "question" and {b[3].split()[0] for b in bars[1:]} == {
        "sms",
        "node_limit",
        "precision",
        "ranks",
        "tokens",
    }
    assert [int(b[1]) for b in bars] == list(range(len(bars))) and {int(b[2]) for b in bars} == {len(bars)}
    assert [len(b[0]) for b in bars] == [30 * i // len(bars) for i in range(len(bars))]
    assert shown.endswith(b"\r\x1b[K"), "the bar is still there"
    assert answer(plan(*words)) == (out, ""), "without a terminal there is no bar, and the answer is the same"


def test_sweeps_repeat_the_question_itself():
    q = ask("deepseek-v2-lite", "h100", 8, 4)
    plan = make_plan(q, sweeps=("tokens", "ranks"))
    assert dict(plan.sweeps["tokens"])[4] == plan.prediction == dict(plan.sweeps["ranks"])[8]


@pytest.mark.parametrize("ranks,tokens", [(320, 128), (32, 4096)], ids=["decode", "prefill"])
def test_the_docs_say_what_the_planner_says(ranks, tokens):
    """docs/planning.md: its tables, and the bytes sent by a rank."""
    p = predict(ask("deepseek-v3", "h800", ranks, tokens))
    text = " ".join((Path(__file__).parents[2] / "docs/planning.md").read_text().split())
    if ranks == 320:
        said = [
            f"| dispatch | {p.dispatch_us:.0f} us | {p.dispatch_slowest_us:.0f} us |",
            f"| combine | {p.combine_us:.0f} us | {p.combine_slowest_us:.0f} us |",
            f"{p.rail_bytes / 1e6:.1f} MB leave a rank per step; its NIC is busy {p.hottest_share:.0%} of the time",
        ]
    else:
        said = [
            f"| slowest rank | {p.dispatch_slowest_us / 1e3:.2f} ms | {p.combine_slowest_us / 1e3:.2f} ms |",
            f"busy {p.hottest_share:.0%} of the step: {p.rail_bytes / 1e6:.0f} MB leave a rank over it, "
            f"{p.node_bytes / 1e6:.0f} MB over NVLink",
        ]
    assert [line for line in said if line not in text] == []
