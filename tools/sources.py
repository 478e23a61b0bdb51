"""Which C++ sources make up what: for setup.py, the C++ tests, the emulated GPU and the PTX tools. Paths
are relative to the checkout.

`python tools/sources.py tests` prints one list, for make.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(folder, suffix=".cpp"):
    """The sources of one folder of csrc, sorted."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


BALANCE = files("balance")
SHARED = [*files("runtime"), *files("session")]  # what every runtime uses
ROWS = [s for s in files("fabric/cpu") if Path(s).name.startswith("rows")]
FIBERS = files("exec")
NCCL_HOST = "csrc/runtime/cuda/nccl.cpp", "csrc/runtime/cuda/nccl_absent.cpp"  # with NCCL, without it

CORE = [*files("fabric/cpu"), *files("runtime/cpu"), *SHARED, *BALANCE]
SIM = [*FIBERS, *files("fabric/sim"), *files("runtime/sim"), *SHARED, *ROWS, *BALANCE]
QUANT = ["csrc/runtime/cpu/quant.cpp", *ROWS]
CUDA_HOST = [*(s for s in files("runtime/cuda") if s not in NCCL_HOST), *SHARED]
KERNELS = [s for s in files("runtime/cuda/kernels", ".cu") if not s.endswith("gin.cu")]
GIN_KERNELS = ["csrc/runtime/cuda/kernels/gin.cu"]


def parts(*packages):
    """Cython modules that share the library of one extension: those of packages of moecomm/_native."""
    return [str(p.relative_to(ROOT)) for name in packages for p in sorted((NATIVE / name).glob("*.pyx"))]


NATIVE = ROOT / "moecomm/_native"
PARTS = {
    "moecomm._native.core": parts("shared", "cpu_world"),
    "moecomm._native.cuda": parts("cuda_world"),
    "moecomm._native.sim": parts("sim_world"),
}
TESTS = sorted({*CORE, *SIM})  # what every C++ test is linked with

if __name__ == "__main__":
    print(*globals()[sys.argv[1].upper()])
