"""`python -m examples.deepseek_v3.serve`: the short form of `make v3-serve`, and a server that Ctrl-C ends."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.deepseek_v3.serve.__main__ import main, shape_of
from examples.deepseek_v3.serve.config import UnitShape

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed: make examples")

ROOT = Path(__file__).parents[2]
SMALL = (
    "--model",
    "tiny",
    "--prefill",
    "2x2",
    "--decode",
    "2x1+1/2",
    "--slots",
    "4",
    "--rebalance-seconds",
    "0.5",
)


@pytest.fixture
def program():
    """Start the command; end it at the end of the test."""
    started = []

    def start(*words, **environment):
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "examples.deepseek_v3.serve", *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def descendants(pid):
    """Return the descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def test_bench_in_short(tmp_path, program):
    """It succeeds, and results.json reports no lost and no different tokens."""
    out = tmp_path / "results.json"
    words = ("--requests", "20", "--rate", "10", "--prompt", "24", "--tokens", "16", "--out", str(out))
    run = program("bench", *SMALL, *words)
    said, complained = run.communicate(timeout=150)
    assert run.returncode == 0, said + complained
    found = json.loads(out.read_text())
    assert (found["requests"], found["failed"], found["lost_tokens"], found["mismatched_tokens"]) == (
        20,
        0,
        0,
        0,
    )
    assert found["ttft"].keys() == found["tpot"].keys() == {"p50", "p90", "p99"}
    assert all(len(load["rows_per_rank"]) == 2 for load in found["loads"].values())
    assert found["placements_used"]["decode"] >= 1
    assert found["config"]["decode"] == {"ranks": 2, "ranks_per_node": 1, "redundant": 1, "attention_tp": 2}
    assert re.search(r"mismatched tokens +0 ", said)


@pytest.mark.parametrize("how", ["INT", "KILL"])
def test_the_end_of_a_server(program, ctrl_c, tmp_path, how):
    """The server answers; Ctrl-C ends it and all its ranks. If it is killed, its ranks exit. No file is left."""
    run = program("http", *SMALL, "--port", "0", TMPDIR=str(tmp_path))
    address = re.search(r"(http://\S+)/v1", run.stdout.readline())[1]

    async def ask():
        async with aiohttp.ClientSession() as session:
            body = {"prompt": "ab", "max_tokens": 5, "return_token_ids": True}
            answer = await session.post(f"{address}/v1/completions", json=body)
            return await answer.json()

    assert len(asyncio.run(ask())["choices"][0]["token_ids"]) == 5
    family = descendants(run.pid)
    assert len(family) >= 5  # four ranks, and the process that forks them
    assert list(tmp_path.iterdir())
    run.send_signal(getattr(signal, f"SIG{how}"))
    assert run.wait(timeout=60) == (0 if how == "INT" else -signal.SIGKILL), run.stderr.read()
    deadline = time.monotonic() + 60
    while any(map(runs, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(filter(runs, family))
    assert [p.name for p in tmp_path.iterdir() if "serve" in p.name] == []


def runs(pid):
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_wrong_argument_is_an_error_in_words(capsys):
    assert main(["bench", "--model", "tiny", "--decode", "3x2"]) == 1
    assert re.search(
        r"InvalidArgument: decode is .*; expected a multiple of ranks_per_node", capsys.readouterr().err
    )
    assert main(["bench", "--model", "tiny", "--decode", "4x2+1/4"]) == 1
    assert (
        "attention_tp is 4; expected a divisor of the 4 ranks and of the 2 heads" in capsys.readouterr().err
    )
    assert main(["bench", "--model", "nowhere"]) == 1
    assert "make v3-train" in capsys.readouterr().err
    shapes = [shape_of(text) for text in ("4x2", "3", "10x2+0/2")]
    assert shapes == [UnitShape(4, 2, 1), UnitShape(3, 3, 1), UnitShape(10, 2, 0, attention_tp=2)]
    with pytest.raises(SystemExit):
        main(["bench", "--decode", "4x"])
    assert "expected RANKSxPER_NODE" in capsys.readouterr().err
