"""Trains with several numbers of ranks and compares the curves: loss, MTP loss, loss of secrets, norm of the gradient.

    python -m examples.deepseek_v3.same_curve --ranks 1 2 4 8        # make v3-ranks

Starts each run with mpirun. The last sum of a gradient has another order with another number of ranks, so curves
agree within rounding, which grows with every step. Fails if they differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

KEYS = ("loss", "mtp_loss", "needle_loss", "gradient")
# 8 experts, so 8 ranks have one each; 6 sequences, so two of 8 ranks have none.
SIZES = {
    "corpus-bytes": 150_000,
    "vocabulary": 600,
    "length": 48,
    "batch": 6,
    "steps": 12,
    "experts": 8,
    "retrieval": 0.5,
}


def train(ranks: int, out: Path, mpirun: str) -> list[dict[str, Any]]:
    """Train with this number of ranks; return the steps of its results.json."""
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "examples.deepseek_v3.train", "--quiet", "--extend", "--out", str(out)]
    subprocess.run([*mpirun.split(), "-n", str(ranks), *program, *sizes], check=True)
    steps: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["steps"]
    return steps


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    """Largest relative difference of a value over all steps; infinite if one curve has other steps."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=False)]
    if len(ours) != len(theirs) or any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    return max((abs(a - b) / abs(b) for a, b in pairs if a is not None), default=0.0)


def main() -> int:
    """Compare all numbers of ranks with the first; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, default=Path("build/v3-ranks"))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--mpirun", default="mpirun --oversubscribe --bind-to none", help="with its options")
    args = parser.parse_args()
    curves = {n: train(n, args.out / str(n), args.mpirun) for n in args.ranks}
    first, worst = curves[args.ranks[0]], 0.0
    print(f"largest relative difference to {args.ranks[0]} rank(s) over {len(first)} steps")
    print("ranks " + " ".join(f"{key:>12}" for key in KEYS))
    found = {}
    for n in args.ranks:
        found[n] = {key: difference(curves[n], first, key) for key in KEYS}
        worst = max(worst, *found[n].values())
        print(f"{n:5} " + " ".join(f"{found[n][key]:12.1e}" for key in KEYS))
    (args.out / "results.json").write_text(json.dumps({"ranks": found, "steps": curves}, indent=1) + "\n")
    return 0 if worst <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
