"""Builds the native extensions: needs Python and g++ alone. nvcc, where it is found, adds the CUDA world.

Objects are compiled in parallel, and only those whose sources or headers changed.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
RUNTIME = sorted(str(p.relative_to(ROOT)) for folder in ("fabric", "runtime") for p in (ROOT / "csrc" / folder).glob("*.cpp")
                 if not p.name.startswith("sim"))
SIM = ["csrc/exec/fiber.cpp", "csrc/fabric/sim.cpp", *map(str, sorted(Path("csrc/runtime").glob("sim*.cpp"))), "csrc/runtime/plan.cpp", "csrc/runtime/memory.cpp",
       *(s for s in RUNTIME if "fabric/rows" in s)]
QUANT = ["csrc/runtime/quant.cpp", *(s for s in RUNTIME if "fabric/rows" in s)]
BALANCE = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/balance").glob("*.cpp"))
HEADERS = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".hpp", ".inl")]
# Equal bits from every build of the row kernels: no contraction of a product and a sum into one rounding.
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]


def ucx_folder():
    """Where the UCX wheel has its headers and libraries, without importing it."""
    return Path(importlib.util.find_spec("libucx").origin).parent


class BuildExt(build_ext):
    """build_ext with parallel compilation and real header dependencies."""

    def build_extension(self, ext):
        compiler, plain = self.compiler, self.compiler._compile
        depfile = lambda obj: Path(obj).with_suffix(".d")   # noqa: E731

        def is_fresh(obj):
            if not depfile(obj).exists() or not Path(obj).exists():
                return False
            words = depfile(obj).read_text().replace("\\\n", " ").split(":", 1)[1].split()
            made = Path(obj).stat().st_mtime
            return all(os.path.exists(w) and os.stat(w).st_mtime <= made for w in [*words, __file__])

        def compile_all(sources, output_dir=None, macros=None, include_dirs=None, debug=0, extra_preargs=None, extra_postargs=None, depends=None):
            macros, objects, extra, arguments, build = compiler._setup_compile(output_dir, macros, include_dirs, sources, depends, extra_postargs)
            options = compiler._get_cc_args(arguments, debug, extra_preargs)

            def one(obj):
                if not is_fresh(obj):
                    source, suffix = build[obj]
                    plain(obj, source, suffix, options, [*extra, "-MMD", "-MF", str(depfile(obj))], arguments)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(one, objects))
            return objects

        compiler.compile = compile_all
        ext.depends = HEADERS   # else setuptools looks at the sources alone before it asks for their objects
        super().build_extension(ext)


ucx = ucx_folder()
core = Extension(
    "moecomm._native.core",
    ["moecomm/_native/core.pyx", *RUNTIME],
    language="c++",
    include_dirs=["csrc", str(ucx / "include")],
    library_dirs=[str(ucx / "lib")],
    libraries=["ucp", "ucs"],
    extra_compile_args=FLAGS,
    # Beside this package in site-packages; moecomm loads UCX first wherever else it may lie.
    extra_link_args=["-Wl,-rpath,$ORIGIN/../../libucx/lib"],
)
sim = Extension("moecomm._native.sim", ["moecomm/_native/sim.pyx", *SIM], language="c++",
                include_dirs=["csrc", str(ucx / "include")], extra_compile_args=FLAGS)
quant = Extension("moecomm._native.quant", ["moecomm/_native/quant.pyx", *QUANT], language="c++",
                  include_dirs=["csrc", str(ucx / "include")], extra_compile_args=FLAGS)
balance = Extension("moecomm._native.balance", ["moecomm/_native/balance.pyx", *BALANCE], language="c++",
                    include_dirs=["csrc"], extra_compile_args=FLAGS)
setup(ext_modules=cythonize([core, sim, quant, balance], language_level=3, build_dir="build/cython"), cmdclass={"build_ext": BuildExt})
