"""Everything that can be checked without running the library: `make lint`, or `python tools/lint.py [NAME...]`.

A check whose tool is not installed is skipped, and the last line says so. `--install` installs the missing tools, with
the versions of the group `lint` in pyproject.toml, one by one: one that cannot be had does not stop the others.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHON = ["moecomm", "bench", "examples", "tests", "tools", "docs", "setup.py"]
PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROSE = [*PYTHON, "csrc", *PAGES]
# Checked for banned phrases.
PLAIN = [
    "bench",
    "csrc",
    "docs",
    "examples",
    "moecomm",
    "tests",
    "tools",
    "setup.py",
    *(p for p in PAGES if "/" not in p),
]


def sources(folders, suffixes):
    """Paths relative to the checkout, without what Cython generates."""
    found = (p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return sorted(
        str(p.relative_to(ROOT)) for p in found if not p.with_suffix(".pyx").exists() or p.suffix == ".pyx"
    )


# Classes of Cython have no subclasses.
STUBTEST = [
    "--concise",
    "--mypy-config-file",
    "tools/stubtest.ini",
    "--ignore-disjoint-bases",
    "--allowlist",
    "tools/stubtest.txt",
    "--ignore-unused-allowlist",
]


def native_modules():
    """The extensions that are built here, whose stubs are compared with them; without that of CUDA, which needs a
    driver to be loaded.
    """
    folder = ROOT / "moecomm/_native"
    built = [p.stem for p in sorted(folder.glob("*.pyi")) if any(folder.glob(f"{p.stem}.*.so"))]
    parts = ["shared", "cpu_world"] if "core" in built else []  # importing moecomm loads them
    return [
        *(f"moecomm._native.{name}" for name in built if name != "cuda"),
        *(
            f"moecomm._native.{name}.{p.stem}"
            for name in parts
            for p in sorted((folder / name).glob("*.pyi"))
        ),
    ]


@dataclass(frozen=True)
class Check:
    """One command; `tool` is the distribution that it needs, or None."""

    name: str
    tool: str | None
    command: list


def checks():
    """All checks, the slowest first: they run side by side."""
    python = [sys.executable, "-m"]
    scripts = Path(sys.executable).parent
    cpp = sources(["csrc", "tests/cpp", "tools"], {".hpp", ".cpp", ".inl", ".cu", ".cuh"})
    cython = sources(["moecomm"], {".pyx", ".pxd"})
    stubs = native_modules()
    return [
        Check("clang-format", "clang-format", [str(scripts / "clang-format"), "--dry-run", "-Werror", *cpp]),
        Check("ruff", "ruff", [*python, "ruff", "check", "--quiet", *PYTHON]),
        Check("ruff format", "ruff", [*python, "ruff", "format", "--check", "--quiet", *PYTHON]),
        Check("cython-lint", "cython-lint", [str(scripts / "cython-lint"), *cython]),
        Check("codespell", "codespell", [*python, "codespell_lib", *PROSE]),
        Check("mypy", "mypy", [*python, "mypy"]),
        *([Check("stubtest", "mypy", [*python, "mypy.stubtest", *STUBTEST, *stubs])] if stubs else []),
        Check("phrases", None, [sys.executable, "tools/phrases.py", *PLAIN]),
    ]


def is_installed(tool):
    """Whether the distribution is there; clang-format has no module that could be imported."""
    if tool is None:
        return True
    try:
        return metadata.distribution(tool) is not None
    except metadata.PackageNotFoundError:
        return False


def install():
    """Install each missing tool of the group `lint`."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for requirement in groups["lint"]:
        name, version = re.fullmatch(r"([\w-]+)==([\w.]+)", requirement).groups()
        if not is_installed(name) or metadata.version(name) != version:
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", requirement], timeout=120, check=False
            )


def run(check):
    """(check, seconds, exit status, output); the status is None where the tool is not installed."""
    if not is_installed(check.tool):
        return check, 0.0, None, ""
    start = time.monotonic()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cython-lint runs pycodestyle
    done = subprocess.run(
        check.command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    return check, time.monotonic() - start, done.returncode, done.stdout + done.stderr


def main():
    """Run the checks, print what they find; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"checks to run: {', '.join(c.name for c in checks())}")
    parser.add_argument("--install", action="store_true", help="install missing tools and run nothing")
    args = parser.parse_args()
    if args.install:
        return install()
    known = {check.name: check for check in checks()}
    if unknown := set(args.names) - set(known):
        parser.error(f"unknown checks: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    failed, skipped = [], []
    with ThreadPoolExecutor(2) as pool:
        for check, seconds, status, output in pool.map(run, [known[n] for n in args.names or known]):
            state = "skipped" if status is None else "failed" if status else "ok"
            print(f"{check.name:<14} {state:<8} {seconds:5.1f} s", flush=True)
            if status is None:
                skipped.append(check.tool)
            elif status:
                failed.append(check.name)
                print(output, flush=True)
    if skipped:
        tools = ", ".join(sorted(set(skipped)))
        print(f"lint: skipped what needs {tools}, not installed: run python tools/lint.py --install")
    if failed:
        print(f"lint: failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
