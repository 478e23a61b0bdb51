"""The ledger: results of `make bench` on each machine, in bench/ledger/, and the tables of the documentation.

add    add bench/results/latest.json to the ledger, with the commit
show   print the tables
docs   write the tables to docs/performance.md
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from moecomm import InvalidArgument, options

from .suite import RESULTS

FOLDER = Path(__file__).parent / "ledger"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN = "<!-- ledger: written by `python -m bench ledger docs` -->"
END = "<!-- end of ledger -->"


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument(
        "action",
        choices=("add", "show", "docs"),
        help="add a run, print the tables, or write them to the docs",
    )
    parser.add_argument(
        "--results",
        type=options.file_to_read,
        help=f"file that `make bench` has written (default: {RESULTS / 'latest.json'})",
    )
    parser.add_argument(
        "--folder", type=options.folder_to_write, default=str(FOLDER), help="folder of the ledger"
    )


def main(args):
    """Run the action; return the exit status."""
    if args.action == "add":
        print(add(args.results or RESULTS / "latest.json", args.folder))
    elif args.action == "show":
        print("\n\n".join(map(table, entries(args.folder))))
    else:
        write(PAGE, entries(args.folder))
    return 0


def add(results, folder, commit=None, date=None):
    """Add one run to the ledger; return the path of the new file.

    A second run of the same commit on the same CPU replaces the first.
    """
    latest = read(results)
    commit = commit or _commit()
    entry = {
        "cpu": latest["machine"]["cpu"],
        "cores": latest["machine"]["cores"],
        "commit": commit,
        "date": date or time.strftime("%Y-%m-%d"),
        "versions": latest["versions"],
        "cases": latest["cases"],
    }
    name = re.sub(r"[^a-z0-9]+", "-", f"{entry['cpu']} {entry['cores']} cores".lower()).strip("-")
    path = Path(folder) / f"{name}-{commit[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n")
    return path


def read(path):
    """Read a JSON file. Raises InvalidArgument with its name if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"{path}: {error}; expected a file that `make bench` or the ledger has written", op="bench ledger"
        ) from None


def entries(folder=FOLDER):
    """The newest entry of each CPU, sorted by CPU."""
    newest = {}
    for entry in map(read, sorted(Path(folder).glob("*.json"))):
        key = entry["cpu"], entry["cores"]
        if key not in newest or entry["date"] >= newest[key]["date"]:
            newest[key] = entry
    return [newest[key] for key in sorted(newest)]


def table(entry):
    """Format an entry as a Markdown table."""
    names = list(dict.fromkeys(name for case in entry["cases"] for name in case["baselines"]))
    lines = [
        f"**{entry['cpu']}, {entry['cores']} cores**, {entry['date']}, commit {entry['commit'][:10]}",
        "",
        f"| nodes x ranks | op | ms | of floor | cold: of floor | best baseline | {' | '.join(names)} |",
        "|---|---|--:|--:|--:|---|" + "--:|" * len(names),
    ]
    for case in entry["cases"]:
        cold, best = case["cold"], case["best_baseline"]
        cells = [
            f"{case['nodes']} x {case['ranks'] // case['nodes']}",
            "round trip" if case["op"] == "roundtrip" else case["op"],
            f"{case['time_us'] / 1e3:.1f}",
            f"{case['floor_fraction']:.0%}" + (" (in cache)" if case["in_cache"] else ""),
            f"{cold['floor_fraction']:.0%}" if cold else "",
            best["name"] if best else "",
            *(f"{case['ratios'][n]:.2f} x" if n in case["ratios"] else "" for n in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(page, found):
    """Write the tables between the two marks of a page."""
    text = Path(page).read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    tables = "\n\n".join(map(table, found))
    Path(page).write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")


def _commit():
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=FOLDER.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise InvalidArgument(
            f"the commit is unknown ({error}); expected a git checkout of moecomm",
            op="bench ledger",
        ) from None
    return done.stdout.strip()
