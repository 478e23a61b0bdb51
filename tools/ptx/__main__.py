"""`make ptx-check`: the cuda world's tests over the kernels that nvcc has made, without a GPU."""

import os
import subprocess
import sys
import time

from ptx import build

TESTS = ("test_ptx_kernels", "test_cuda", "test_cuda_graphs", "test_cuda_faults", "test_cuda_balance", "test_cuda_order")


def check():
    """Translate, build, run every test that the emulated GPU has; returns an exit status."""
    reason = build.why_not()
    if reason:
        print(f"ptx-check: skipped, {reason}")
        return 0
    began = time.monotonic()
    build.objects()
    lines = sum(path.read_text().count("\n") for path in build.programs())
    print(f"ptx-check: {lines} lines of the machine's text from {', '.join(build.KERNELS)}, in {time.monotonic() - began:.0f} s", flush=True)
    tests = [str(build.ROOT / "tests" / f"{name}.py") for name in TESTS if (build.ROOT / "tests" / f"{name}.py").exists()]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "not real", *tests, *sys.argv[2:]], cwd=build.ROOT,
                          env={**os.environ, "EMULATED_KERNELS": "ptx"}).returncode


if __name__ == "__main__":
    sys.exit(check())
