"""`make cuda-check`: what can be said of the CUDA sources without a GPU. Closes with "N passed, M failed".

Compiles every kernel for sm_90a (and sm_80, which has no copy engine), reads the compiler's resource report, and looks
into the machine code for what the design promises: bulk copies, 16-byte accesses, release and acquire at system
scope, no read-only (.nc) loads, no local memory.
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
SOURCES = sorted((ROOT / "csrc/world/cuda").glob("*.cu"))
NCCL = nccl_headers.find()
FLAGS = ["-std=c++20", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", *([f"-I{NCCL}"] if NCCL else []), "-diag-suppress=20011,20012,20013,20014,20015"]
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
    """The machine code of a cubin as text; None where there is no disassembler."""
    dump = disassembler()
    if dump is None:
        return None
    path = f"{Path(dump).parent}{os.pathsep}{os.environ['PATH']}"   # it calls nvdisasm, which lies beside it
    run = subprocess.run([dump, "--dump-sass", str(cubin)], capture_output=True, text=True, env={**os.environ, "PATH": path})
    return run.stdout if run.returncode == 0 else None


def compiled(source, arch, folder):
    """(cubin, resource report, seconds) of one source for one architecture; None where it does not compile."""
    out = Path(folder) / f"{source.stem}.{arch}.cubin"
    start = time.monotonic()
    run = subprocess.run(["nvcc", *FLAGS, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", str(source), "-o", str(out)],
                         capture_output=True, text=True)
    if run.returncode:
        print(run.stderr)
        return None
    return out, run.stderr, time.monotonic() - start


def kernels(report):
    """{kernel: (stack bytes, spilled bytes, registers)} from ptxas -v."""
    found = {}
    for block in report.split("Compiling entry function '")[1:]:
        name = re.search(r"\d\d?([a-z][a-z_]*_kernel)", block)[1]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block).groups())
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


def look_inside(name, sass):
    """The promises about one kernel's machine code for sm_90a."""
    count = lambda pattern: len(re.findall(pattern, sass))   # noqa: E731
    kernel = name.split()[-1]   # without its source
    between_ranks, decodes = "dispatch" in kernel or "combine" in kernel, kernel.startswith(("dequantize", "decode_rows"))
    in_words = kernel.startswith("transpose")   # neither codes nor their tiles are 16 bytes wide there
    if "dispatch" in kernel:
        check(f"{name}: bulk copies through the engine", count(r"\bUBLKCP\b") >= 2, f"{count(r'UBLKCP')} of them")
    if not decodes and not in_words:
        check(f"{name}: 16-byte loads", count(r"\bLDG?\.E\S*\.128") >= 1, f"{count(r'LDG?.E[^ ]*.128')}")
    if between_ranks or decodes:
        check(f"{name}: 16-byte stores", count(r"\bSTG?\.E\S*\.128") >= 1, f"{count(r'STG?.E[^ ]*.128')}")
    if between_ranks:
        check(f"{name}: acquire at system scope", count(r"\bLD\S*\.STRONG\.SYS") >= 1, f"{count(r'LD[^ ]*.STRONG.SYS')} loads")
        check(f"{name}: release at system scope", count(r"\bMEMBAR\S*\.SYS") >= 1 and count(r"\b(?:RED|ATOM)\S*\.STRONG\.SYS") >= 1,
              f"{count(r'MEMBAR[^ ]*.SYS')} barriers, {count(r'(?:RED|ATOM)[^ ]*.STRONG.SYS')} adds")
    check(f"{name}: no read-only loads", count(r"\bLDG?\S*\.(?:CONSTANT|NC)\b") == 0, f"{count(r'LDG?[^ ]*.(?:CONSTANT|NC)')}")
    check(f"{name}: no local memory", count(r"\b(?:LDL|STL)\b") == 0, f"{count(r'(?:LDL|STL)')} accesses")


def main():
    """Run all checks; the exit status says whether one failed."""
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: nothing to compile with\n0 passed, 0 failed")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            if source.stem == "gin" and NCCL is None:
                print(f"skip {source.name}: no NCCL headers of version {nccl_headers.OLDEST} or newer (pip install nvidia-nccl-cu13, or NCCL_HOME)")
                continue
            older = compiled(source, "80", folder)
            check(f"{source.name}: compiles for sm_80 (no copy engine)", older is not None)
            made = compiled(source, "90a", folder)
            check(f"{source.name}: compiles for sm_90a", made is not None, f"{made[2]:.0f} s of nvcc, {made[0].stat().st_size} bytes" if made else "")
            if made is None:
                continue
            for name, (stack, spilled, registers) in kernels(made[1]).items():
                check(f"{source.stem}, {name}: nothing spills, no stack", stack == 0 and spilled == 0, f"{registers} registers, {stack} bytes of stack, {spilled} spilled")
            sass = disassembly(made[0])
            if sass is None:
                print("skip machine code: no disassembler (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
                continue
            for name, text in functions(sass).items():
                look_inside(f"{source.stem}, {name}", text)
    failed = results.count(False)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
