"""Builds the native extensions: needs Python and g++ alone. nvcc, where it is found, adds the CUDA world.

Objects are compiled in parallel, and only those whose sources or headers changed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402 - beside this file
import nccl_headers  # noqa: E402
import sources  # noqa: E402

HEADERS = [
    str(p.relative_to(ROOT))
    for p in (ROOT / "csrc").rglob("*")
    if p.suffix in (".hpp", ".inl", ".cuh", ".cu")
]
# Equal bits from every build of the row kernels: no contraction of a product and a sum into one rounding.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]


def ucx_headers():
    """The folder of UCX's headers: UCX_HOME, the wheel libucx-cu12 or libucx-cu13, or the system's."""
    wheel = importlib.util.find_spec("libucx")
    places = [
        *([Path(os.environ["UCX_HOME"]) / "include"] if "UCX_HOME" in os.environ else []),
        *([Path(wheel.submodule_search_locations[0]) / "include"] if wheel else []),
        Path("/usr/include"),
        Path("/usr/local/include"),
    ]
    found = next((place for place in places if (place / "ucp/api/ucp.h").exists()), None)
    if found is None:
        sys.exit(
            "setup.py: UCX's headers were not found; expected ucp/api/ucp.h. Run pip install libucx-cu13 "
            "(or libucx-cu12), install your "
            "system's UCX development package, or set UCX_HOME."
        )
    return str(found)


class BuildExt(build_ext):
    """build_ext with parallel compilation and real header dependencies."""

    def build_extension(self, ext):
        compiler, plain = self.compiler, self.compiler._compile
        depfile = lambda obj: Path(obj).with_suffix(".d")  # noqa: E731

        def is_fresh(obj):
            if not depfile(obj).exists() or not Path(obj).exists():
                return False
            words = depfile(obj).read_text().replace("\\\n", " ").split(":", 1)[1].split()
            made = Path(obj).stat().st_mtime
            return all(os.path.exists(w) and os.stat(w).st_mtime <= made for w in [*words, __file__])

        def compile_all(
            sources,
            output_dir=None,
            macros=None,
            include_dirs=None,
            debug=0,
            extra_preargs=None,
            extra_postargs=None,
            depends=None,
        ):
            macros, objects, extra, arguments, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            options = compiler._get_cc_args(arguments, debug, extra_preargs)

            def one(obj):
                if not is_fresh(obj):
                    source, suffix = build[obj]
                    plain(obj, source, suffix, options, [*extra, "-MMD", "-MF", str(depfile(obj))], arguments)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(one, objects))
            return objects

        # What an extension is made of and how may change though no file does: NCCL's headers come, an
        # architecture is added.
        kernels = KERNELS.get(ext.name, [])
        compile_kernel = [cuda_toolkit.nvcc(), *NVCC_FLAGS, *cuda_toolkit.architectures()] if kernels else []
        parts, whole = (
            Path(self.build_temp) / f"{ext.name}.parts",
            repr([ext.sources, ext.extra_compile_args, kernels, compile_kernel]),
        )
        same = parts.exists() and parts.read_text() == whole
        for source in kernels:
            obj = str(Path(self.build_temp) / source) + ".o"
            if not (same and is_fresh(obj)):
                Path(obj).parent.mkdir(parents=True, exist_ok=True)
                launcher = [found] if (found := shutil.which("ccache")) else []
                subprocess.run(
                    [*launcher, *compile_kernel, "-MD", "-MF", str(depfile(obj)), "-c", source, "-o", obj],
                    check=True,
                )
            ext.extra_objects.append(obj)
        compiler.compile = compile_all
        before, self.force = self.force, self.force or not same
        ext.depends = [
            *HEADERS,
            __file__,
        ]  # else setuptools looks at the sources alone before it asks for their objects
        super().build_extension(ext)
        parts.write_text(whole)
        self.force = before

    def run(self):
        if (
            self.editable_mode
        ):  # pip's own folder goes after this build, and the next one would compile everything again
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        super().run()
        folder = Path(self.get_ext_fullpath("moecomm._native.core")).parent
        if NO_CUDA is not None:  # an earlier build's would not fit this one's stub and host code
            Path(self.get_ext_fullpath("moecomm._native.cuda")).unlink(missing_ok=True)
        (folder / "built.json").write_text(
            json.dumps({"no_cuda": NO_CUDA, "no_nccl": None if NCCL else nccl_headers.why_not()})
        )


# -- the CUDA world ------------------------------------------------------------------------------------------

NO_CUDA = cuda_toolkit.why_not()  # None: it is built
NCCL = nccl_headers.find()  # None: ranks of one host only
# By name, because cythonize() returns new Extension objects.
KERNELS = {"moecomm._native.cuda": [*sources.KERNELS, *(sources.GIN_KERNELS if NCCL else [])]}

NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "-Icsrc",
    *([f"-I{NCCL}"] if NCCL else []),
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-diag-suppress=20011,20012,20013,20014,20015",
]  # a role's lambdas may call what only a GPU has


def cuda_extension():
    """[the extension], or [] where it cannot be built."""
    if NO_CUDA is not None:
        return []
    home = cuda_toolkit.home()
    return [
        Extension(
            "moecomm._native.cuda",
            ["moecomm/_native/cuda.pyx", *sources.CUDA_HOST, sources.NCCL_HOST[0 if NCCL else 1]],
            language="c++",
            include_dirs=["csrc", str(home / "include"), ucx],
            library_dirs=[str(home / "lib64"), str(home / "lib")],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            extra_compile_args=[*FLAGS, *([f"-isystem{NCCL}"] if NCCL else [])],
        )
    ]


ucx = ucx_headers()
core = Extension(
    "moecomm._native.core",
    ["moecomm/_native/core.pyx", *sources.CORE],
    language="c++",
    include_dirs=["csrc", ucx],
    libraries=["dl"],  # UCX is found when it is needed: csrc/fabric/cpu/ucx_library.hpp
    extra_compile_args=FLAGS,
)
sim = Extension(
    "moecomm._native.sim",
    ["moecomm/_native/sim.pyx", *sources.SIM],
    language="c++",
    include_dirs=["csrc", ucx],
    extra_compile_args=FLAGS,
)
quant = Extension(
    "moecomm._native.quant",
    ["moecomm/_native/quant.pyx", *sources.QUANT],
    language="c++",
    include_dirs=["csrc", ucx],
    extra_compile_args=FLAGS,
)
balance = Extension(
    "moecomm._native.balance",
    ["moecomm/_native/balance.pyx", *sources.BALANCE],
    language="c++",
    include_dirs=["csrc"],
    extra_compile_args=FLAGS,
)


def declarations_changed():
    """Whether a .pxd is newer than a generated file: cythonize() misses some cimports."""
    sources = list((ROOT / "moecomm/_native").rglob("*.p*"))
    made = [
        (ROOT / "build/cython" / p.relative_to(ROOT)).with_suffix(".cpp")
        for p in sources
        if p.suffix == ".pyx"
    ]
    made = [p.stat().st_mtime for p in made if p.exists()]
    declared = [p.stat().st_mtime for p in sources if p.suffix == ".pxd"]
    return bool(made) and max(declared) > min(made)


def with_parts(extensions):
    """The extensions, each with its parts: modules of their own that share its library, and so its C++ state."""
    parts = {
        e.name: [
            Extension(path.removesuffix(".pyx").replace("/", "."), [path], language="c++")
            for path in sources.PARTS.get(e.name, [])
        ]
        for e in extensions
    }
    made = cythonize(
        [*extensions, *(part for some in parts.values() for part in some)],
        language_level=3,
        build_dir="build/cython",
        force=declarations_changed(),
    )
    made = {e.name: e for e in made}
    for extension in extensions:
        made[extension.name].sources += [s for part in parts[extension.name] for s in made[part.name].sources]
    return [made[e.name] for e in extensions]


# The benchmarks stand beside the package in a checkout (`python -m bench`); what is installed has them
# inside (`moecomm bench`).
setup(
    packages=[*find_namespace_packages(include=["moecomm*"]), "moecomm.bench"],
    package_dir={"moecomm.bench": "bench"},
    ext_modules=with_parts([core, sim, quant, balance, *cuda_extension()]),
    cmdclass={"build_ext": BuildExt},
)
