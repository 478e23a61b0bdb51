"""`make ptx-check`: the cuda world's tests over the kernels that nvcc has made, without a GPU."""

import os
import subprocess
import sys
import time

from ptx import build

TESTS = (
    "test_ptx_kernels.py",
    "test_ptx_order.py",
    "test_ptx_edges.py",
    "test_ptx_performance.py",
    "test_cuda*.py",
)


def check():
    """Translate, build, run every test that the emulated GPU has; returns an exit status."""
    reason = build.why_not()
    if reason:
        print(f"ptx-check: skipped, {reason}")
        return 0
    began = time.monotonic()
    build.objects()
    lines = sum(path.read_text().count("\n") for path in build.programs())
    print(
        f"ptx-check: {lines} lines of the machine's text from {', '.join(build.KERNELS)}, in "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    tests = [str(path) for pattern in TESTS for path in sorted((build.ROOT / "tests").rglob(pattern))]
    build.COSTS.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not real", *tests, *sys.argv[2:]],
        cwd=build.ROOT,
        env={**os.environ, "EMULATED_KERNELS": "ptx"},
        check=False,
    ).returncode
    if build.COSTS.exists():
        print(build.COSTS.read_text())
    return status


def main():
    """check, or mutants [KIND] [--single]."""
    if sys.argv[1:2] != ["mutants"]:
        return check()
    if build.why_not():
        print(f"ptx mutants: skipped, {build.why_not()}")
        return 0
    os.environ["EMULATED_KERNELS"] = "ptx"  # before emulated_gpu is imported
    sys.path.insert(0, str(build.ROOT / "tests" / "support"))
    sys.path.insert(0, str(build.ROOT))
    from ptx import mutants

    words = [w for w in sys.argv[2:] if w != "--single"]
    return bool(mutants.run(only=words[0] if words else None, single="--single" in sys.argv))


if __name__ == "__main__":
    sys.exit(main())
