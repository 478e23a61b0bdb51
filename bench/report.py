"""Output of a measurement: table rows like those of nccl-tests, JSON, CSV, and a chart."""

from __future__ import annotations

import csv
import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import moecomm
from moecomm._native import core

from .measure import OWN

# Keys of a case in bench/results/latest.json. Records for --json and --csv have more.
KEYS = (
    "op",
    "routing",
    "nodes",
    "ranks",
    "tokens",
    "hidden",
    "experts",
    "top_k",
    "time_us",
    "p99_us",
    "logical_bytes",
    "rail_bytes",
    "node_bytes",
    "wrong",
    "baselines",
    "ratios",
    "best_baseline",
    "floor_fraction",
    "in_cache",
    "cold",
    "kernel",
)
# Keys of `cold`: the same case with evicted caches.
COLD_KEYS = ("time_us", "p99_us", "wrong", "baselines", "ratios", "best_baseline", "floor_fraction")


def record(case, measured):
    """Make the flat record of one op of a case, with KEYS and the further keys of --json and --csv.

    Bytes are those of one call over all ranks. logical_bytes counts one row per token and destination rank (per pick
    in combine of the expert layout), including rows that stay on their rank. rail_bytes and node_bytes are sent
    between nodes and inside nodes.
    """
    op, names = case.op, [n for n in measured.times if n != OWN]
    hops = measured.hops[op]
    return {
        **{k: v for k, v in asdict(case).items() if k not in ("channels",)},
        "ranks": case.ranks,
        "time_us": round(measured.median(OWN, op), 1),
        "p99_us": round(measured.p99(OWN, op), 1),
        "logical_bytes": round(hops["node"]["logical_bytes"]),
        "rail_logical_bytes": round(hops["rail"]["logical_bytes"]),
        "rail_bytes": round(hops["rail"]["physical_bytes"]),
        "node_bytes": round(hops["node"]["physical_bytes"]),
        "wrong": measured.wrong[OWN][op],
        "baselines": {n: round(measured.median(n, op), 1) for n in names},
        "baselines_wrong": {n: measured.wrong[n][op] for n in names},
        "ratios": {n: round(measured.median(n, op) / measured.median(OWN, op), 3) for n in names},
        "best_baseline": best_of({n: measured.median(n, op) for n in names}, measured.median(OWN, op)),
        "floor_fraction": round(measured.floor[op] * 1e6 / measured.median(OWN, op), 4),
        "in_cache": measured.in_cache,
        "cold": None,
        "kernel": kernel(),
        "plan_us": round(1e6 * float(np.median(measured.plan)), 1),
        "iterations": len(measured.times[OWN][op]),
        "rail": measured.rail,
    }


def best_of(times, own):
    """The fastest of {baseline: microseconds}: name, time, and ratio to the time of moecomm. None without baselines."""
    if not times:
        return None
    name = min(times, key=times.__getitem__)
    return {"name": name, "time_us": round(times[name], 1), "ratio": round(times[name] / own, 3)}


def kernel():
    """Row kernels of this process: the build, and the variants for sums of few and of many terms."""
    build, few, many, *_ = core.row_kernel_choice()
    return {"build": build, "few": few, "many": many}


def merge(records, others):
    """Add the baselines of another run of the same cases. Their ratios are relative to moecomm in that run."""
    for record, other in zip(records, others, strict=True):
        record["wrong"] += other["wrong"]
        for key in ("baselines", "baselines_wrong", "ratios"):
            if key in record:
                record[key] = {**record[key], **other[key]}
        best = min(
            (b for b in (record["best_baseline"], other["best_baseline"]) if b),
            key=lambda b: b["ratio"],
            default=None,
        )
        record["best_baseline"] = best
        if record.get("cold") and other.get("cold"):
            merge([record["cold"]], [other["cold"]])


def headline(r):
    """One line about an op: time, ratio to the best baseline and share of the floor, with warm and cold caches."""
    words = [f"# {r['nodes']} x {r['ranks'] // r['nodes']} {r['op']:<9} {r['time_us'] / 1e3:8.2f} ms"]
    for name, at in (("warm", r), ("cold", r["cold"])):
        if at:
            best = at["best_baseline"]
            against = f"{best['ratio']:.2f} x {best['name']} (best baseline), " if best else ""
            words.append(f"{name}: {against}{at['floor_fraction']:.0%} of the floor")
    return "; ".join(words) + (" (in cache)" if r["in_cache"] else "")


def header(names):
    """Header of the table: columns and units."""
    columns = [
        "op",
        "time",
        "p99",
        "logical",
        "alg",
        "rail log.",
        "rail phys.",
        "rail",
        "node phys.",
        "node",
        "of floor",
        "#wrong",
    ]
    units = ["", "us", "us", "MB", "GB/s", "MB", "MB", "GB/s", "MB", "GB/s", "%", ""]
    ratios = [f"/{n}" for n in names]
    return "\n".join(
        "# " + "".join(_cells([*row, *extra]))
        for row, extra in ((columns, ratios), (units, ["x (us)"] * len(names)))
    )


def row(r):
    """Format a record as a line of the table. The column of a baseline has its ratio to moecomm, and its time."""
    seconds = r["time_us"] / 1e6
    mb, gbs = (lambda b: f"{b / 1e6:.2f}"), (lambda b: f"{b / 1e9 / seconds:.2f}")
    cells = [
        r["op"],
        f"{r['time_us']:.1f}",
        f"{r['p99_us']:.1f}",
        mb(r["logical_bytes"]),
        gbs(r["logical_bytes"]),
        mb(r["rail_logical_bytes"]),
        mb(r["rail_bytes"]),
        gbs(r["rail_bytes"]),
        mb(r["node_bytes"]),
        gbs(r["node_bytes"]),
        f"{100 * r['floor_fraction']:.1f}",
        str(r["wrong"]),
    ]
    for name, us in r["baselines"].items():
        wrong = r["baselines_wrong"][name]
        cells.append(f"{us / r['time_us']:.2f} ({us:.0f})" + (f" {wrong} WRONG" if wrong else ""))
    return "  " + "".join(_cells(cells))


def _cells(texts):
    widths = [11, 11, 11, 10, 8, 10, 11, 8, 11, 8, 9, 8]
    return [t.rjust(widths[i] if i < len(widths) else 18) for i, t in enumerate(texts)]


def about(case, r):
    """Lines above the rows of a case."""
    where = "; all data fits into the last-level cache" if r["in_cache"] else ""
    return (
        f"# {case.title()}\n# rail {r['rail']}; {r['iterations']} iterations, outputs overwritten, every "
        f"result checked{where}; a dispatch with rows of 16 bytes (everything but the payload) takes "
        f"{r['plan_us']:.0f} us"
    )


def machine():
    """Description of this machine."""
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in cpu if line.startswith("model name")), platform.processor()
    )
    return {
        "system": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "row_kernels": core.isa(),
    }


def versions():
    """Versions of the software."""
    found = {
        "moecomm": moecomm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ucx": core.ucx_version(),
    }
    try:
        from mpi4py import MPI

        found["mpi"] = MPI.Get_library_version().split(",")[0].strip("\0 \n")
    except (ImportError, RuntimeError):
        pass
    return found


def write_latest(path, records):
    """Write latest.json: an object with machine, versions, and cases that have exactly KEYS."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [{k: r[k] for k in KEYS} for r in records]
    path.write_text(
        json.dumps({"machine": machine(), "versions": versions(), "cases": cases}, indent=1) + "\n"
    )


def append(records, *, json_path=None, csv_path=None):
    """Append one JSON object per line, and one CSV row per case with flattened nested values."""
    if json_path:
        with open(json_path, "a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
    if csv_path:
        flat = [
            {
                (f"{k}.{n}" if isinstance(v, dict) else k): x
                for k, v in r.items()
                for n, x in (v.items() if isinstance(v, dict) else [(k, v)])
            }
            for r in records
        ]
        fresh = not os.path.exists(csv_path) or os.path.getsize(csv_path) == 0
        with open(csv_path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for r in flat for k in r)))
            if fresh:
                writer.writeheader()
            writer.writerows(flat)


def plot(path, records):
    """Write a chart: one panel per routing and geometry, with the times of moecomm and the baselines per op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((r["nodes"], r["ranks"], r["routing"], r["tokens"]) for r in records))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels):
        mine = [r for r in records if (r["nodes"], r["ranks"], r["routing"], r["tokens"]) == panel]
        names = [OWN, *mine[0]["baselines"]]
        for i, name in enumerate(names):
            times = [(r["time_us"] if name == OWN else r["baselines"][name]) / 1e3 for r in mine]
            bars = axis.bar(
                [x + 0.8 * i / len(names) for x in range(len(mine))], times, 0.8 / len(names), label=name
            )
            axis.bar_label(bars, [f"{t:.3g}" for t in times], fontsize=7)
        floors = [r["time_us"] * r["floor_fraction"] / 1e3 for r in mine]
        for x, floor in enumerate(floors):
            axis.plot(
                [x - 0.4 / len(names), x + 0.8 - 0.4 / len(names)],
                [floor, floor],
                "k--",
                lw=1,
                label="traffic floor" if x == 0 else None,
            )
        axis.set_xticks([x + 0.4 - 0.4 / len(names) for x in range(len(mine))], [r["op"] for r in mine])
        axis.set_yscale("log")
        axis.set_ylabel("ms (median)")
        nodes, ranks, routing, tokens = panel
        axis.set_title(
            f"{nodes} node{'s' * (nodes > 1)} x {ranks // nodes} ranks, {tokens} tokens, {routing}",
            fontsize=10,
        )
        axis.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def of_all_ops(case, measured, ops):
    """Records of a measured routing, one per op."""
    return [record(replace(case, op=op), measured) for op in ops]
