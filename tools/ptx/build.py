"""PTX of the kernels, its translation, and the cuda world's extension over them. Made again only where
something has changed.

nvcc compiles a kernel's source once: its PTX is run, and its host code launches it. The translation is kept
by the PTX's hash.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from ptx.assembler import assemble  # noqa: E402
from ptx.parser import parse  # noqa: E402

FOLDER = ROOT / "build/ptx"
KERNELS = ("kernels", "decode", "domain", "quant")
COSTS = FOLDER / "costs.txt"  # the table that tests/ptx/test_ptx_performance.py has measured
RUNTIME = ROOT / "tools/ptx/runtime"
MACHINE = tuple(
    RUNTIME / f"{name}.cpp"
    for name in ("arithmetic", "async", "checker", "costs", "exports", "load", "memory", "schedule")
)
GLUE = RUNTIME / "driver.cpp", RUNTIME / "launches.cpp"  # to the cuda world's host code
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# As setup.py compiles them, for the GPU whose PTX this tool knows.
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "-lineinfo",
    "-Icsrc",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-diag-suppress=20011,20012,20013,20014,20015",
)


def nvcc():
    """Path of the compiler: PATH, CUDA_HOME or the wheels of the package registry; or None."""
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if found:
        return found
    for folder in map(Path, sys.path):
        for path in folder.glob("nvidia/cu*/bin/nvcc"):
            if (path.parent.parent / "include/cuda_runtime.h").exists():
                return str(path)
    return None


def why_not():
    """Return None if the PTX can be made, else the reason."""
    return (
        None
        if nvcc()
        else "no nvcc: neither on PATH, nor in CUDA_HOME, nor as wheels "
        "(pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)"
    )


def is_fresh(made, needs):
    """Whether a file is there and none of what it is made of is newer."""
    return made.exists() and all(
        Path(n).exists() and Path(n).stat().st_mtime <= made.stat().st_mtime for n in needs
    )


def needs_of(dependencies):
    """The files that a compiler has listed."""
    return (
        dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if dependencies.exists()
        else [dependencies]
    )


def compile_kernels():
    """{name: (PTX, object of the host code)}."""
    made, running = {}, []
    for name in KERNELS:
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        ptx, host, listed = folder / f"{name}.ptx", folder / f"{name}.o", folder / f"{name}.d"
        made[name] = ptx, host
        if is_fresh(host, [ROOT / n for n in needs_of(listed)]) and ptx.exists():
            continue
        command = [
            nvcc(),
            *NVCC_FLAGS,
            "--keep",
            "--keep-dir",
            str(folder),
            "-MMD",
            "-MF",
            str(listed),
            "-c",
            f"csrc/runtime/cuda/kernels/{name}.cu",
            "-o",
            str(host),
        ]
        running.append((name, subprocess.Popen(command, cwd=ROOT)))
    failed = [name for name, process in running if process.wait()]
    if failed:
        raise RuntimeError(f"nvcc has failed for {', '.join(failed)}")
    return made


def translate(ptx):
    """Path of the machine's text of a PTX file."""
    text = ptx.read_text()
    made = FOLDER / f"{ptx.stem}.{version()}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.machine"
    if not made.exists():
        for old in FOLDER.glob(f"{ptx.stem}.*.machine"):
            old.unlink()
        partial = made.with_suffix(".partial")
        partial.write_text(assemble(parse(text)))
        partial.rename(made)
    return made


def version():
    """Of the translator itself."""
    sources = sorted((ROOT / "tools/ptx").glob("*.py"))
    return hashlib.sha256(
        b"".join(s.read_bytes() for s in sources if s.stem in ("parser", "opcodes", "assembler"))
    ).hexdigest()[:8]


def compiled(sources):
    """Object files."""
    made, running = [], []
    FOLDER.mkdir(parents=True, exist_ok=True)
    wide = ["-mavx2"] if "avx2" in Path("/proc/cpuinfo").read_text() else []
    for source in sources:
        made.append(FOLDER / f"{source.stem}.o")
        listed = made[-1].with_suffix(".d")
        if is_fresh(made[-1], [ROOT / n for n in needs_of(listed)]):
            continue
        flags = [
            "-std=c++20",
            "-O2",
            "-ftree-vectorize",
            *wide,
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-iquote",
            "tests/cpp/emulated/fibers",
            "-Itests/cpp/emulated",
            "-Icsrc",
        ]
        running.append(
            subprocess.Popen(
                [*COMPILER, *flags, "-MMD", "-MF", str(listed), "-c", str(source), "-o", str(made[-1])],
                cwd=ROOT,
            )
        )
    if any(p.wait() for p in running):
        raise RuntimeError("the PTX machine does not compile")
    return made


def objects():
    """The machine's object files, and those of the kernels' host code."""
    return [*compiled((*MACHINE, *GLUE)), *(host for _, host in compile_kernels().values())]


def machine():
    """Path of the machine as a library of its own."""
    made, parts = FOLDER / "machine.so", compiled(MACHINE)
    if not is_fresh(made, parts):
        subprocess.run([*COMPILER, "-shared", *map(str, parts), "-o", str(made), "-pthread"], check=True)
    return made


def programs():
    """The machine's texts of all kernels."""
    return [translate(ptx) for ptx, _ in compile_kernels().values()]
