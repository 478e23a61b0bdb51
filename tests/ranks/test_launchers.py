"""All ways to start a world: alone, mpirun of Open MPI and of MPICH, torchrun."""

import sys

import pytest
from launching import ROOT, mpirun, start, torchrun

HELLO = ROOT / "examples" / "hello_dispatch.py"
MPICH = ROOT / ".venv-mpich" / "bin"


def assert_hello(output, ranks):
    for rank in range(ranks):
        assert f"rank {rank} has its 5 tokens back" in output


def test_hello_alone():
    assert_hello(start(sys.executable, HELLO), 1)


def test_hello_by_mpirun():
    assert_hello(start(*mpirun(4), HELLO), 4)


def test_mpi_may_be_imported_first(tmp_path):
    """Open MPI brings its own UCX, and a process can load only one: the first import decides.

    The rail works with both.
    """
    late = tmp_path / "late.py"
    late.write_text(
        "from mpi4py import MPI\nimport runpy\nassert MPI.COMM_WORLD.size == 4\n"
        f"runpy.run_path({str(ROOT / 'tests' / 'support' / 'launched.py')!r}, run_name='__main__')\n"
    )
    for direct in "01":
        output = start(*mpirun(4), late, MOECOMM_UCX_DIRECT=direct)
        assert all(f"rank {r} of 4 is done" in output for r in range(4))


def test_hello_by_torchrun():
    assert_hello(start(*torchrun(4), HELLO), 4)


def test_cases_by_torchrun():
    output = start(*torchrun(4), ROOT / "tests" / "support" / "launched.py")
    assert all(f"rank {r} of 4 is done" in output for r in range(4))


def test_a_world_makes_no_group_of_torch(tmp_path):
    """moecomm makes no torch group.

    Threads of such a group abort the process if they free a tensor while the interpreter ends, and the caller may
    want to make the group.
    """
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, torch, moecomm\n"
        "def gloo(): return [n for t in os.listdir('/proc/self/task') if 'gloo' in (n := "
        "open(f'/proc/self/task/{t}/comm').read())]\n"
        "with moecomm.Communicator() as comm:\n"
        "    buf = moecomm.Buffer(comm, hidden=8, num_experts=2, top_k=1, max_tokens=2)\n"
        "    out = buf.dispatch(torch.ones(2, 8, requires_grad=True).bfloat16(), torch.tensor([[0], [1]]))\n"
        "    buf.combine(out.x, out.handle).float().sum().backward()\n"
        "    assert not gloo(), gloo()\n"
        "torch.distributed.init_process_group('gloo')\n"
        "torch.distributed.barrier()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    start(*torchrun(2), worker)


def test_mpich():
    """mpi4py finds the MPICH wheel, and a world starts under its mpiexec."""
    if not (MPICH / "mpiexec").exists():
        pytest.skip("MPICH: not installed (make mpich)")
    launcher = [MPICH / "mpiexec", "-n", 4, MPICH / "python"]
    assert "MPICH" in start(*launcher, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())")
    assert_hello(start(*launcher, HELLO), 4)
    output = start(
        *launcher,
        "-m",
        "pytest",
        "-q",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ROOT,
        "--with-mpi",
        ROOT / "tests" / "mpi",
        "-k",
        "edges or mismatch",
    )
    assert " passed" in output and "failed" not in output


def test_info_runs_anywhere(tmp_path):
    output = start(sys.executable, "-m", "moecomm", "info")
    assert "world cpu" in output and "MOECOMM_CHECK" in output
