"""The wheel, installed in a fresh environment without a compiler, like an installation from a package index."""

import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = Path(sys.executable).parent  # launchers of the test environment; it has no compiler


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Make a wheel of this checkout, without rebuilding built objects."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(ROOT),
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(folder),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return next(folder.glob("moecomm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return run(command, ...) in an environment with the wheel, and the torch and launchers of this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "env", with_pip=False)
    packages = next((home / "env/lib").glob("python*")) / "site-packages"
    (packages / "base.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # its .pth files are not read, so the checkout is not importable
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(home / "env/bin/python"),
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--ignore-installed",
            str(wheel),
        ],
        check=True,
    )
    path = os.pathsep.join([str(home / "env/bin"), str(BASE)])
    assert not any(shutil.which(name, path=path) for name in ("cc", "gcc", "g++", "nvcc"))
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("OMPI_", "PMI", "PRTE_", "MPI_")) and k not in ("PYTHONPATH", "VIRTUAL_ENV")
    }

    def run(*command, **environment):
        found = shutil.which(str(command[0]), path=path)
        assert found, f"{command[0]} is not in the environment"
        done = subprocess.run(
            [found, *map(str, command[1:])],
            cwd=home,
            env={**clean, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, (
            f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    said = run("python", "-c", "import moecomm; print(moecomm.__file__)")
    assert str(home) in said, said
    return run


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "moecomm/bench/__main__.py",
        "moecomm/tables/clusters/h800.toml",
        "moecomm/_native/core.pyi",
        "moecomm/_native/cpu_world/buffer.pyi",
        "moecomm/py.typed",
    ):
        assert name in names, name
    assert not [
        n for n in names if n.startswith(("bench/", "tests/", "tools/")) or n.endswith((".hpp", ".cu"))
    ]
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    import moecomm

    assert re.search(rf"^Version: {re.escape(moecomm.__version__)}$", metadata, re.M)
    assert not re.search(r"^Requires-Dist: [^;\n]*==", metadata, re.M), (
        "an exact pin is no dependency that a user can live with"
    )


def test_quickstart(installed, tmp_path):
    readme = (ROOT / "README.md").read_text()
    code, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", readme, re.S).groups()
    (tmp_path / "quickstart.py").write_text(
        "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines())
    )
    assert installed("python", tmp_path / "quickstart.py") == output


def test_hello(installed):
    hello = ROOT / "examples" / "hello_dispatch.py"
    for launcher in (
        ["torchrun", "--standalone", "--nproc-per-node", 2],
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", 2, "python"],
    ):
        if not (BASE / launcher[0]).exists():
            pytest.skip(f"{launcher[0]} is not installed")
        if launcher[0] == "torchrun":
            launcher = ["python", "-m", "torch.distributed.run", *launcher[1:]]
        said = installed(*launcher, hello)
        assert all(f"rank {rank} has its 5 tokens back" in said for rank in range(2))


def test_commands(installed):
    assert "world cpu" in installed("moecomm", "info")
    assert "nothing found" in installed("moecomm", "explore", "--schedules", "1")
    assert "usage: moecomm bench" in installed("moecomm", "bench", "--help")


def test_bench(installed):
    """Two nodes of two ranks, verified like every benchmark."""
    if not (BASE / "mpirun").exists():
        pytest.skip("mpirun is not installed")
    said = installed(
        "moecomm",
        "bench",
        "roundtrip",
        "--nodes",
        2,
        "--ranks-per-node",
        2,
        "--tokens",
        64,
        "--hidden",
        256,
        "--experts",
        16,
        "--iters",
        2,
        "--warmup",
        1,
        "--baseline",
        "none",
    )
    assert "roundtrip" in said


NODES = """
import sys, torch.distributed as dist
{without}
import moecomm
try:
    comm = moecomm.Communicator(ranks_per_node=1, timeout=20)
    print(f"joined {comm.num_nodes}\\n", end="", flush=True)
except moecomm.MoecommError as error:
    print(f"{error}\\n", end="", flush=True)
"""


@pytest.mark.parametrize("without", ["", "sys.modules['libucx'] = None"], ids=["wheel", "none"])
def test_ucx_is_found_when_nodes_are_joined(without, tmp_path):
    """Without UCX, one node works, and two nodes raise an error on both ranks that names the package to install."""
    script = tmp_path / "nodes.py"
    script.write_text(NODES.replace("{without}", without))
    said = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    ).stdout
    if not without:
        assert said.count("joined 2") == 2, said
    else:
        found_anyway = said.count("joined 2") == 2  # the system's UCX
        assert found_anyway or said.count("pip install libucx-cu12 or libucx-cu13") == 2, said
        alone = (
            "import sys; sys.modules['libucx'] = None\nimport moecomm\n"
            "print(moecomm.run_local(lambda comm: comm.size, 2, ranks_per_node=1), moecomm.info.worlds()['cpu'][0])"
        )
        said = subprocess.run(
            [sys.executable, "-c", alone.replace("moecomm.info", "__import__('moecomm.info').info")],
            check=True,
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        ).stdout
        assert said == "[2, 2] True\n"


def test_every_extra_is_described():
    """docs/install.md has exactly one row for each extra."""
    extras = re.findall(
        r"^(\w+) = \[",
        re.search(
            r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S
        )[1],
        re.M,
    )
    table = (ROOT / "docs" / "install.md").read_text().split("## Extras")[1].split("## Commands")[0]
    assert sorted(
        re.findall(
            r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("|"))
        )
    ) == sorted(extras)
