"""Compares the speed of this checkout and of a commit. Both are built on this machine and measured alternately.

Each tree is measured with its own benchmark. A row is slower if the median of head / commit over the rounds exceeds 1
by more than `--tolerance` and by more than the noise of the row, which is its interquartile range.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moecomm import InvalidArgument, options

from . import cases

ROOT = Path(__file__).resolve().parent.parent


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--rounds", type=options.positive, default=6, help="number of rounds")
    parser.add_argument("--iters", type=options.positive, default=6, help="iterations per round and tree")
    parser.add_argument(
        "--tokens", type=options.count, default=0, help="tokens per rank; 0: as in `make bench`"
    )
    parser.add_argument(
        "--hidden", type=options.count, default=0, help="elements of a token; 0: as in `make bench`"
    )
    parser.add_argument(
        "--tolerance", type=options.share, default=0.03, help="share of the time of a row (default: 0.03)"
    )
    parser.add_argument(
        "--json", type=options.file_to_write, metavar="FILE", help="also write the rows to this file"
    )


@dataclass
class Row:
    """One op of one case: times of both trees in microseconds, by round."""

    case: str
    op: str
    base: list
    head: list

    @property
    def ratios(self):
        """Head / base, by round."""
        return np.asarray(self.head) / np.asarray(self.base)

    @property
    def ratio(self):
        """Median of the ratios."""
        return float(np.median(self.ratios))

    @property
    def noise(self):
        """Interquartile range of the ratios."""
        low, high = np.percentile(self.ratios, [25, 75])
        return float(high - low)

    def slower(self, tolerance):
        """Whether head is slower by more than the tolerance and the noise."""
        return self.ratio > 1 + max(tolerance, self.noise)


def main(args):
    """Print one row per case and op. The exit status is 1 if a row is slower."""
    if not (ROOT / ".git").exists():
        raise InvalidArgument(f"{ROOT} is not a git checkout; expected one of moecomm", op="bench compare")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(tree), args.commit)
        try:
            _build(tree)
            rows = measure(tree, args)
        finally:
            _git("worktree", "remove", "--force", str(tree))
    print(f"{'case':<8}{'op':<12}{'commit ms':>10}{'head ms':>10}{'ratio':>8}{'noise':>8}")
    for row in rows:
        base, head = np.median(row.base) / 1e3, np.median(row.head) / 1e3
        verdict = "  SLOWER" if row.slower(args.tolerance) else ""
        print(
            f"{row.case:<8}{row.op:<12}{base:>10.2f}{head:>10.2f}{row.ratio:>8.3f}{row.noise:>8.3f}{verdict}"
        )
    if args.json:
        found = [{**vars(r), "ratio": r.ratio, "noise": r.noise} for r in rows]
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row.slower(args.tolerance) for row in rows))


def measure(tree, args):
    """Measure both trees alternately. Their order changes from round to round."""
    rows = {}
    for i in range(args.rounds):
        for name, where in [("base", tree), ("head", ROOT)][:: 1 if i % 2 else -1]:
            for case in cases.FAMILIES:
                for record in _run(where, case, args):
                    key = f"{case.nodes}x{case.ranks_per_node}", record["op"]
                    row = rows.setdefault(key, Row(*key, [], []))
                    getattr(row, name).append(record["time_us"])
    return list(rows.values())


def _run(tree, case, args):
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        words = {
            "nodes": case.nodes,
            "ranks-per-node": case.ranks_per_node,
            "tokens": args.tokens or case.tokens,
            "hidden": args.hidden or case.hidden,
            "experts": case.experts,
            "top-k": case.top_k,
            "groups": case.groups,
            "top-groups": case.top_groups,
            "routing": case.routing,
            "baseline": "none",
            "iters": args.iters,
            "json": records,
        }
        options_ = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, "-m", "bench", "roundtrip", *options_],
            cwd=tree,
            env=dict(os.environ, PYTHONPATH=str(tree)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InvalidArgument(
                f"the benchmark of {tree} failed: {(done.stderr or done.stdout)[-800:]}", op="bench compare"
            )
        return [json.loads(line) for line in records.read_text().splitlines()]


def _build(tree):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=dict(os.environ, MOECOMM_NO_CUDA="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InvalidArgument(f"the commit does not build: {done.stderr[-800:]}", op="bench compare")


def _git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InvalidArgument(f"git {words[0]}: {done.stderr.strip()}", op="bench compare")
