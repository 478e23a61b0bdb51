"""`make cuda-check`: what can be said of the CUDA sources without a GPU. Closes with "N passed, M failed".

Compiles every kernel for sm_90 (and sm_80, which has no copy engine), reads the compiler's resource report, and looks
into the machine code for what the design promises: bulk copies, 16-byte accesses, release and acquire at system
scope, no read-only (.nc) loads, no local memory; and into the PTX for the order between the copy engine and
the threads.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nccl_headers

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/runtime/cuda/kernels").glob("*.cu")) + sorted(
    (ROOT / "examples/roles").glob("*.cu")
)
NCCL = nccl_headers.find()
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    f"-I{ROOT / 'csrc'}",
    *([f"-I{NCCL}"] if NCCL else []),
    "-diag-suppress=20011,20012,20013,20014,20015",
]
MAX_WARPS = int(
    re.search(r"kMaxWarps = (\d+)", (ROOT / "csrc/runtime/cuda/kernels/launch.hpp").read_text())[1]
)
results = []


def check(what, ok, detail=""):
    """Record one finding and print it."""
    results.append(ok)
    print(f"{'ok  ' if ok else 'FAIL'} {what}{': ' + detail if detail else ''}")


def disassembler():
    """cuobjdump of the toolkit or of its wheel, or None."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    for folder in map(Path, sys.path):
        for path in folder.glob("nvidia/cu*/bin/cuobjdump"):
            return str(path)
    return None


def disassembly(cubin):
    """Return the machine code of a cubin as text, or None without a disassembler."""
    dump = disassembler()
    if dump is None:
        return None
    path = f"{Path(dump).parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm, which lies beside it
    run = subprocess.run(
        [dump, "--dump-sass", str(cubin)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        check=False,
    )
    return run.stdout if run.returncode == 0 else None


def compiled(source, arch, folder):
    """(cubin, resource report, seconds) of one source for one architecture; None where it does not compile."""
    out = Path(folder) / f"{source.stem}.{arch}.cubin"
    start = time.monotonic()
    run = subprocess.run(
        [
            "nvcc",
            *FLAGS,
            "-cubin",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-Xptxas=-v",
            str(source),
            "-o",
            str(out),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        print(run.stderr)
        return None
    return out, run.stderr, time.monotonic() - start


def kernels(report):
    """{kernel: (stack bytes, spilled bytes, registers)} from ptxas -v."""
    found = {}
    for block in report.split("Compiling entry function '")[1:]:
        name = re.search(r"\d\d?([a-z][a-z_]*_kernel)", block)[1]
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
            ).groups(),
        )
        found[name] = stack, stores + loads, int(re.search(r"Used (\d+) registers", block)[1])
    return found


def functions(sass):
    """{kernel: its instructions} of a disassembly."""
    found = {}
    for block in sass.split("Function : ")[1:]:
        name = re.search(r"\d\d?([a-z][a-z_]*_kernel)", block.split("\n", 1)[0])
        if name:
            found[name[1]] = block
    return found


# What ptxas of CUDA 13.0 cannot keep in 168 registers, by kernel: bytes of stack, bytes spilled, accesses to local
# memory. A change that makes a number larger needs a reason here. What they cost on a GPU has not been measured. Over
# GIN the compiler makes a function of decode's combine, and its caller's registers go to the stack. Since a handle may
# be combined again, that function has one more argument and spills 24 bytes more.
SPILLS = {
    "gin, decode_combine_kernel": (240, 32, 229),
}


def look_inside(name, sass):
    """The promises about one kernel's machine code for sm_90."""
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    kernel = name.split()[-1]  # without its source
    between_ranks, decodes = (
        "dispatch" in kernel or "combine" in kernel or kernel.startswith("domain"),
        kernel.startswith(("dequantize", "decode_rows")),
    )
    signals_only = kernel.startswith("decode_release")  # it moves no rows
    in_words = kernel.startswith("transpose")  # neither codes nor their tiles are 16 bytes wide there
    if "dispatch" in kernel or kernel.startswith(("domain_one_sided", "domain_multicast")):
        check(
            f"{name}: bulk copies through the engine",
            count(r"\bUBLKCP\b") >= 2,
            f"{count(r'UBLKCP')} of them",
        )
    if not decodes and not in_words and not signals_only:
        check(f"{name}: 16-byte loads", count(r"\bLDG?\.E\S*\.128") >= 1, f"{count(r'LDG?.E[^ ]*.128')}")
    if between_ranks or decodes:
        check(f"{name}: 16-byte stores", count(r"\bSTG?\.E\S*\.128") >= 1, f"{count(r'STG?.E[^ ]*.128')}")
    if between_ranks or signals_only:
        check(
            f"{name}: acquire at system scope",
            count(r"\bLD\S*\.STRONG\.SYS") >= 1,
            f"{count(r'LD[^ ]*.STRONG.SYS')} loads",
        )
        check(
            f"{name}: release at system scope",
            count(r"\bMEMBAR\S*\.SYS") >= 1 and count(r"\b(?:RED|ATOM)\S*\.STRONG\.SYS") >= 1,
            f"{count(r'MEMBAR[^ ]*.SYS')} barriers, {count(r'(?:RED|ATOM)[^ ]*.STRONG.SYS')} adds",
        )
    check(
        f"{name}: no read-only loads",
        count(r"\bLDG?\S*\.(?:CONSTANT|NC)\b") == 0,
        f"{count(r'LDG?[^ ]*.(?:CONSTANT|NC)')}",
    )
    most = SPILLS.get(name, (0, 0, 0))[2]
    check(
        f"{name}: {'no' if not most else 'little'} local memory",
        count(r"\b(?:LDL|STL)\b") <= most,
        f"{count(r'(?:LDL|STL)')} accesses",
    )


def instructions(ptx):
    """PTX without comments, labels and empty lines."""
    return [
        line.strip()
        for line in ptx.splitlines()
        if line.strip() and not line.strip().startswith(("//", "$L"))
    ]


def unfenced(lines, release):
    """Releases that bulk stores are not in order before: none of wait_group 0, then a proxy fence, shortly
    before them.
    """
    found = []
    for i, line in enumerate(lines):
        if not re.match(release, line):
            continue
        before = lines[max(0, i - 16) : i]
        fence = max(
            (n for n, earlier in enumerate(before) if earlier.startswith("fence.proxy.async.global")),
            default=-1,
        )
        if (
            fence < 1
            or not any(earlier.startswith("cp.async.bulk.wait_group 0") for earlier in before[:fence])
            or any("bulk.global" in b for b in before[fence:])
        ):
            found.append(line)
    return found


def look_at_launch(source, folder):
    """What a launch, and the order between the copy engine and the threads, rest on; read off the PTX."""
    out = Path(folder) / f"{source.stem}.ptx"
    run = subprocess.run(
        ["nvcc", *FLAGS, "-ptx", "-gencode=arch=compute_90,code=compute_90", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    name, ptx = source.name, out.read_text() if run.returncode == 0 else ""
    newer = subprocess.run(
        ["ptxas", "-arch=sm_100", str(out), "-o", os.devnull], capture_output=True, text=True, check=False
    )
    check(
        f"{name}: its PTX is valid for a newer GPU",
        run.returncode == newer.returncode == 0,
        newer.stderr.strip()[:200] or "sm_100",
    )
    sizes = [int(n) for n in re.findall(r"_kernel\S*_param_0\[(\d+)\]", ptx)]
    check(
        f"{name}: arguments of a launch fit every driver's 4 KiB",
        bool(sizes) and max(sizes) <= 4096,
        f"{max(sizes, default=0)} bytes",
    )
    dynamic = re.findall(r"\.extern \.shared \.align (\d+)", ptx)
    check(
        f"{name}: shared memory starts on 128 bytes",
        bool(dynamic) and all(int(n) >= 128 for n in dynamic),
        ", ".join(dynamic),
    )
    static = re.findall(r"^\s*\.shared .*", ptx, re.M)
    check(
        f"{name}: all of it is the launch's own, so a block may have all that the GPU has",
        not static,
        f"{len(static)} fixed pieces",
    )
    lines = instructions(ptx)
    inits = [i for i, line in enumerate(lines) if line.startswith("mbarrier.init")]
    fenced = sum(
        lines[i + 1].startswith("fence.mbarrier_init")
        and lines[i + 2].startswith("fence.proxy.async.shared::cta")
        for i in inits
    )
    check(
        f"{name}: barriers are known to the copy engine before it uses them",
        len(inits) == fenced > 0,
        f"{fenced} of {len(inits)}",
    )
    for what, release in (
        ("signals to other ranks", r"red\.release\.sys"),
        ("meetings of a rank's groups", r"atom\.acq_rel\.gpu"),
    ):
        count, bad = sum(bool(re.match(release, line)) for line in lines), unfenced(lines, release)
        if count:
            check(
                f"{name}: {what} come behind complete and fenced bulk stores",
                not bad,
                f"{count - len(bad)} of {count}",
            )


def main():
    """Run all checks; the exit status says whether one failed."""
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: nothing to compile with\n0 passed, 0 failed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            if source.stem == "gin" and NCCL is None:
                print(
                    f"skip {source.name}: no NCCL headers of version {nccl_headers.OLDEST} or newer (pip "
                    f"install nvidia-nccl-cu13, or NCCL_HOME)"
                )
                continue
            older = compiled(source, "80", folder)
            check(f"{source.name}: compiles for sm_80 (no copy engine)", older is not None)
            made = compiled(source, "90", folder)
            check(
                f"{source.name}: compiles for sm_90",
                made is not None,
                f"{made[2]:.0f} s of nvcc, {made[0].stat().st_size} bytes" if made else "",
            )
            if made is None:
                continue
            if source.stem in ("kernels", "decode", "domain"):
                look_at_launch(source, folder)
            for name, (stack, spilled, registers) in kernels(made[1]).items():
                most = SPILLS.get(f"{source.stem}, {name}", (0, 0, 0))
                check(
                    f"{source.stem}, {name}: {'little' if most[0] else 'nothing'} spills, "
                    f"{'little' if most[0] else 'no'} stack",
                    stack <= most[0] and spilled <= most[1],
                    f"{registers} registers, {stack} bytes of stack, {spilled} spilled",
                )
                if "dispatch" in name or "combine" in name or name.startswith("domain"):
                    check(
                        f"{source.stem}, {name}: a block of {MAX_WARPS} warps has registers enough",
                        -(-registers // 8) * 8 * 32 * MAX_WARPS <= 65536,
                    )
            sass = disassembly(made[0])
            if sass is None:
                print(
                    "skip machine code: no disassembler (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
                )
                continue
            for name, text in functions(sass).items():
                look_inside(f"{source.stem}, {name}", text)
    failed = results.count(False)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
