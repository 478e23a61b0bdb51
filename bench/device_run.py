"""`python -m bench device`: builds, checks and times the cuda world on one GPU, in less than eight minutes.

Each section is a separate process with a time limit, so a failure or a hang of one section does not affect the
others. The report, device.json and device.md, is written after each section.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch

from moecomm import cuda, options

from . import device_decode, device_torch, launch
from .device import SMALL, SMS, Shape, check_small_worlds, copy_ceiling, measure
from .device_overlap import gemm_overlap

OWN_CODE = Path(__file__).resolve().parent.parent
SECTIONS = {
    "check": 90,
    "base": 45,
    "1x8": 90,
    "2x4": 90,
    "4x2": 90,
    "decode": 120,
    "torch": 60,
    "overlap": 60,
    "sanitizer": 180,
}  # seconds that each may take


def arguments(parser):
    """Add the options of the command."""
    parser.add_argument("--device", default="cuda:0", help="GPU to use")
    parser.add_argument("--iterations", type=options.positive, default=20, help="timed graph replays")
    parser.add_argument("--tokens", type=options.tokens, default=Shape.tokens, help="tokens per rank")
    parser.add_argument(
        "--small",
        action="store_true",
        help="only run the checks on small worlds (as under compute-sanitizer)",
    )
    parser.add_argument("--most-ranks", type=options.ranks, default=8, help="maximum ranks of a small world")
    parser.add_argument("--no-sanitizer", action="store_true", help="skip compute-sanitizer")
    parser.add_argument(
        "--build",
        action="store_true",
        help="build the extension in place first",
    )
    parser.add_argument(
        "--minutes", type=options.above_zero, default=7.5, help="time limit of all sections together"
    )
    parser.add_argument("--only", choices=SECTIONS, help="run one section, in this process")
    parser.add_argument(
        "--ceiling", type=float, default=float("nan"), help="GB/s of a copy, if measured before"
    )
    parser.add_argument(
        "--out",
        type=options.folder_to_write,
        default=os.environ.get("OUT", "bench/results"),
        help="folder for device.json and device.md",
    )


def ready(args):
    """Whether there is a GPU to measure. Prints the reason if not."""
    cuda.prepare_threads()  # before anything touches the GPU
    reason = cuda.why_not()
    if reason is not None:
        print(f"{args.command}: nothing to measure: {reason}")
    return reason is None


def main(args):
    """Run all sections. The exit status is 1 if a result is wrong or a section fails, 2 without a GPU."""
    if not ready(args):
        return 2
    if args.small:
        print(f"small worlds: {check_all(args.device, args.most_ranks)} cases equal the oracle, bit for bit")
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.only:
        return run_section(args, folder / f"device.{args.only}.json")
    return run_all(args, folder)


def run_all(args, folder):
    """Run sections until the time limit. The report is written after each."""
    end = time.monotonic() + 60 * args.minutes
    report = {"rows": [], "decode": [], "failures": {}}
    for name, most in SECTIONS.items():
        if args.no_sanitizer and name == "sanitizer":
            continue
        part, left = folder / f"device.{name}.json", end - time.monotonic()
        part.unlink(missing_ok=True)
        command = [
            *launch.program(),
            "device",
            "--only",
            name,
            "--ceiling",
            str(report.get("ceiling_gbs", "nan")),
            "--device",
            args.device,
            "--iterations",
            str(args.iterations),
            "--tokens",
            str(args.tokens),
            "--out",
            str(folder),
        ]
        try:
            failed = (
                left < 5
                or subprocess.run(command, cwd=OWN_CODE, timeout=min(most, left), check=False).returncode
            )
            why = "no time left" if left < 5 else f"exit status {failed}" if failed else None
        except subprocess.TimeoutExpired:
            why = f"not finished in {min(most, left):.0f} s"
        if why is not None:
            report["failures"][name] = why
            print(f"device: section {name}: {why}")
        if part.exists():
            for key, value in json.loads(part.read_text()).items():
                report[key] = report[key] + value if key in ("rows", "decode") else value
            part.unlink()
        (folder / "device.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "device.md").write_text(markdown(report))
    print(markdown(report))
    return 1 if report["failures"] or any(row["wrong"] for row in report["rows"] + report["decode"]) else 0


def run_section(args, part):
    """Run one section. Its results are written to the file `part` immediately, row by row."""
    found = {}

    def keep(**fields):
        for key, value in fields.items():
            found.setdefault(key, []).append(value) if key in ("rows", "decode") else found.update(
                {key: value}
            )
        part.write_text(json.dumps(found))

    torch.cuda.set_device(args.device)
    shape = Shape(tokens=args.tokens)
    if args.only == "check":
        keep(checked=check_all(args.device, args.most_ranks))
        print(f"small worlds: {found['checked']} cases equal the oracle, bit for bit")
    elif args.only == "base":
        keep(
            gpu=torch.cuda.get_device_name(),
            torch=torch.__version__,
            cuda=torch.version.cuda,
            shape=asdict(shape),
            ceiling_gbs=copy_ceiling(),
        )
        print(
            f"{found['gpu']}: a device-to-device copy moves {found['ceiling_gbs']:.0f} GB/s, reads plus writes"
        )
    elif args.only == "decode":
        for row in device_decode.measure(args, args.ceiling):
            keep(decode=row)
            print(
                f"decode step    {row['nodes']}x{row['ranks_per_node']:<4} {row['tokens']:4} tokens "
                f"{row['us']:9.1f} us, floor {row['floor_us']:.1f} us, {row['wrong']} wrong"
            )
    elif args.only == "torch":
        keep(torch_in_turns=device_torch.in_turns(args, shape))
    elif args.only == "overlap":
        keep(overlap=gemm_overlap(args, shape))
    elif args.only == "sanitizer":
        for tool, said in sanitizer(args.device):
            keep(sanitizer={**found.get("sanitizer", {}), tool: said})
    else:
        nodes, per_node = map(int, args.only.split("x"))
        for sms in SMS:
            for row in measure(args, shape, nodes, per_node, sms, args.ceiling):
                keep(rows=row)
                print(
                    f"{row['call']:14} {nodes}x{per_node:<4} {sms:4} SMs {row['us']:9.1f} us "
                    f"{row['gbs']:7.0f} GB/s {row['fraction']:7.1%} {row['wrong']:6} wrong",
                    flush=True,
                )
    return 0


def check_all(device, most_ranks=8):
    """Check all small worlds with at most `most_ranks` ranks; return the number of cases."""
    worlds = [w for w in (*SMALL, (1, 8)) if w[0] * w[1] <= most_ranks]
    return check_small_worlds(device, worlds) + device_decode.check_small_worlds(device, worlds)


def sanitizer(device):
    """Run compute-sanitizer, if installed, on the small worlds; yield (tool, result).

    A sanitizer that serializes kernels makes ranks wait for each other until their timeout. Then worlds of one rank
    run.
    """
    tool = shutil.which("compute-sanitizer")
    for name in ("memcheck", "racecheck") if tool else ():
        for ranks in (2, 1):
            command = [
                tool,
                "--tool",
                name,
                "--error-exitcode",
                "9",
                *launch.program(),
                "device",
                "--small",
                "--most-ranks",
                str(ranks),
                "--device",
                device,
            ]
            try:
                run = subprocess.run(
                    command, capture_output=True, text=True, timeout=45, cwd=OWN_CODE, check=False
                )
                said = "clean" if run.returncode == 0 else (run.stdout + run.stderr)[-800:]
            except subprocess.TimeoutExpired:
                said = "not finished in 45 s"
            if said == "clean":
                break
        yield name, f"{said} ({ranks} rank{'s' if ranks > 1 else ''} at most)"


def markdown(report):
    """Format the report as a section for docs/measurements.md."""
    lines = []
    if "gpu" in report:
        s = report["shape"]
        lines += [
            f"## {report['gpu']}, torch {report['torch']}",
            "",
            f"A device-to-device copy moves {report['ceiling_gbs']:.0f} GB/s (reads plus writes).",
            f"{s['tokens']} tokens per rank, hidden {s['hidden']}, {s['experts']} experts, "
            f"top-{s['top_k']} in {s['top_groups']} of {s['groups']} groups.",
            "",
        ]
    lines += [
        "| call | nodes x ranks | SMs over all ranks | us | GB/s | share of the copy's rate | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['call']} | {r['nodes']}x{r['ranks_per_node']} | {r['sms']} | {r['us']:.1f} | {r['gbs']:.0f} "
        f"| {r['fraction']:.0%} | {r['wrong']} |"
        for r in report["rows"]
    ]
    lines += ["", *device_decode.markdown(report["decode"]), ""]
    lines += [
        f"torch, interleaved with moecomm, 1x8, 128 SMs, {call}: {t['torch_us']:.0f} us against "
        f"{t['us']:.0f} us, {t['ratio']:.2f} times as long."
        for call, t in report.get("torch_in_turns", {}).items()
    ]
    if report.get("overlap"):
        lines += [
            "A GEMM concurrent with dispatch and combine takes "
            + ", ".join(f"{v:.2f}x with {k} SMs" for k, v in report["overlap"].items())
            + " of its time alone."
        ]
    lines += [
        f"Small worlds that equal the oracle: {report.get('checked', 'not checked')}. compute-sanitizer: "
        f"{report.get('sanitizer') or 'not run'}."
    ]
    lines += [f"Section {name}: {why}." for name, why in report["failures"].items()]
    return "\n".join([*lines, ""])
