"""NCCL in the cuda world.

Without a GPU: the choice of the library, the rules for its version, and the start of the world. With one GPU: two
nodes.
"""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import moecomm
from moecomm import cuda, env, nccl

ROOT = Path(__file__).parents[2]
WHEEL = nccl.wheel_path()
BUILT = importlib.util.find_spec("moecomm._native.cuda") is not None
HEADERS = 23203


def library(version, loaded=True):
    return nccl.Library("/lib/libnccl.so.2", version, loaded)


def test_versions_in_words():
    assert [nccl.spelled(v) for v in (22809, 23000, 23203)] == ["2.28.9", "2.30.0", "2.32.3"]


def test_the_loaded_library_is_found(tmp_path):
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 12  {}\n"
    maps.write_text(
        line.format("/usr/lib/libc.so.6")
        + "7f02-7f03 rw-p 0 0 0\n"
        + line.format("/a b/torch/lib/libnccl.so.2")
    )
    assert nccl.loaded_path(maps) == "/a b/torch/lib/libnccl.so.2"
    maps.write_text(line.format("/usr/lib/libc.so.6"))
    assert nccl.loaded_path(maps) is None


@pytest.mark.skipif(WHEEL is None, reason="NCCL's wheel is not installed")
def test_a_loaded_library_comes_before_the_wheel():
    """This runs in a separate process, because a loaded library stays loaded."""
    code = (
        "from moecomm import nccl\nfirst = nccl.find()\nassert not first.loaded and first.version > 20000\n"
        "second = nccl.find()\nassert second.loaded and (second.path, second.version) == (first.path, "
        "first.version)\nprint('found', second.version)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "found" in run.stdout, run.stderr


def test_ranks_that_share_a_gpu():
    assert nccl.sharing(["a", "b", "c"]) == []
    assert nccl.sharing(["a", "b", "a", "b", "a"]) == [0, 2, 4]


MULTI = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


@pytest.mark.parametrize(
    "have,headers,gpus,several,environment,expected",
    [
        (library(23203), HEADERS, "ab", False, {}, None),
        (library(22907), HEADERS, "ab", False, {}, None),  # windows are enough if memory is the rail
        (library(23203), HEADERS, "ab", True, {}, None),
        (library(23300), HEADERS, "ab", True, {}, None),
        (library(23203), HEADERS, "aa", True, MULTI, None),
        (library(23000), HEADERS, "aa", False, MULTI, None),
        (
            None,
            HEADERS,
            "ab",
            False,
            {},
            "there is no libnccl; expected one that torch has loaded, or NCCL's wheel",
        ),
        (library(23203), 0, "ab", False, {}, "this build has no NCCL; expected its headers"),
        (
            library(22809),
            HEADERS,
            "ab",
            False,
            {},
            r"NCCL 2\.28\.9 .*loaded already.* has no windows.*; expected 2\.29\.0 or newer",
        ),
        (
            library(22907),
            HEADERS,
            "aba",
            False,
            MULTI,
            r"ranks \[0, 2\] share a GPU, but NCCL 2\.29\.7 .* one rank per GPU; expected a GPU for each rank, "
            r"or NCCL 2\.30\.0",
        ),
        (
            library(23203),
            HEADERS,
            "aa",
            False,
            {},
            r"ranks \[0, 1\] share a GPU, which .* allows only with NCCL_MULTI_RANK_GPU_ENABLE=1",
        ),
        (
            library(23203),
            HEADERS,
            "aa",
            False,
            {"NCCL_MULTI_RANK_GPU_ENABLE": "0"},
            "only with NCCL_MULTI_RANK_GPU_ENABLE=1",
        ),
        (
            library(23107, False),
            HEADERS,
            "ab",
            True,
            {},
            r"NCCL 2\.31\.7 .*of the wheel.* older than the headers.*; expected 2\.32\.3 or newer",
        ),
    ],
)
def test_what_a_version_allows(have, headers, gpus, several, environment, expected):
    said = nccl.refusal(have, headers, gpus, several, environment)
    if expected is None:
        assert said is None
    else:
        assert re.search(expected, said), said


@pytest.mark.parametrize(
    "threads,hosts,ipc,wanted,expected",
    [
        (True, [None] * 2, [True] * 2, "auto", "threads"),
        (False, ["h"] * 2, [True] * 2, "auto", "ipc"),
        (False, ["h"] * 2, [True] * 2, "nccl", "nccl"),
        (False, ["h", "i"], [True] * 2, "auto", "nccl"),
        (False, ["h"] * 2, [True, False], "auto", "nccl"),
        (False, ["h"] * 2, [True] * 2, "ipc", "ipc"),
    ],
)
def test_choice_of_fabric(threads, hosts, ipc, wanted, expected):
    assert cuda.fabric_of(threads, hosts, ipc, wanted) == expected


@pytest.mark.parametrize(
    "threads,hosts,ipc,wanted,message",
    [
        (True, [None], [True], "nccl", "is 'nccl', but ranks are threads of one process"),
        (False, ["h", "i"], [True] * 2, "ipc", "ranks are on several hosts"),
        (False, ["h"] * 2, [True, False], "ipc", "CUDA IPC does not work between rank 1"),
        (False, ["h"], [True], "mpi", "is 'mpi'; expected auto, ipc or nccl"),
    ],
)
def test_fabrics_that_do_not_go(threads, hosts, ipc, wanted, message):
    with pytest.raises(moecomm.InvalidArgument, match=message):
        cuda.fabric_of(threads, hosts, ipc, wanted)


def test_memory_that_a_peer_cannot_open_is_not_shared_by_ipc(monkeypatch):
    """All processes can export, but rank 2 sees only its own GPU, so its host uses NCCL."""

    def sample(rank):
        return SimpleNamespace(handle=lambda: b"memory of %d" % rank, opens=lambda handle: rank != 2)

    monkeypatch.setattr(cuda, "native", lambda: SimpleNamespace(IpcSample=sample))
    found = {}

    def main(comm):
        for hosts in (["h"] * 3, ["h", "h", "i"]):
            found[comm.rank, hosts[2]] = cuda._ipc_opens(comm, comm.rank, hosts)

    moecomm.run_local(main, 3, ranks_per_node=3)
    assert all(found[r, "h"] == [True, True, False] and found[r, "i"] == [True] * 3 for r in range(3))
    assert cuda.fabric_of(False, ["h"] * 3, found[0, "h"]) == "nccl"


def test_the_variable_has_a_meaning():
    assert "MOECOMM_CUDA_FABRIC" in [name for name, _, _ in env.describe()]


# -- joining, over an NCCL that waits for all ranks as the real one does -------------------------------------


class FakeNccl:
    """A fake extension for `join`: a world is entered once all ranks with its unique id have called."""

    def __init__(self, size):
        self.size, self.made, self.worlds, self.lock = size, 0, {}, threading.Lock()
        self.PeerAccess = SimpleNamespace(nccl=self.enter)

    def nccl_headers(self):
        return HEADERS

    def nccl_unique_id(self, path):
        assert path == b"/lib/libnccl.so.2"
        with self.lock:
            self.made += 1
        return bytes([self.made]) * 128

    def enter(self, path, geometry, device, unique_id):
        rank, size, _per_node = geometry
        with self.lock:
            world = self.worlds.setdefault(unique_id, SimpleNamespace(ranks=[], met=threading.Barrier(size)))
            world.ranks.append((rank, device))
        world.met.wait(5)
        return world


def joined(
    fake, monkeypatch, size=4, gpus=None, version=lambda rank: 23203, enters=lambda rank: True, timeout=3.0
):
    """Call join() on `size` rank threads; return the world or the error by rank."""
    local = threading.local()
    monkeypatch.setattr(nccl, "find", lambda: library(version(local.rank)))

    def main(comm):
        local.rank = comm.rank
        gpu = gpus[comm.rank] if gpus else f"GPU {comm.rank}"
        native = (
            fake
            if enters(comm.rank)
            else SimpleNamespace(
                nccl_headers=fake.nccl_headers,
                nccl_unique_id=fake.nccl_unique_id,
                PeerAccess=SimpleNamespace(nccl=lambda *_: "left"),
            )
        )
        try:
            return nccl.join(
                native,
                comm.rank,
                (comm.rank, comm.size, 2),
                comm.rank % 2,
                gpu,
                True,
                comm.collective.exchange,
                timeout,
            )
        except moecomm.MoecommError as error:
            return error

    return moecomm.run_local(main, size, timeout=20)


def test_all_ranks_join_one_world(monkeypatch):
    fake = FakeNccl(4)
    worlds = joined(fake, monkeypatch)
    assert all(w is worlds[0] for w in worlds) and fake.made == 1 and list(fake.worlds) == [b"\1" * 128]
    assert sorted(worlds[0].ranks) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_a_rank_that_does_not_come(monkeypatch):
    found = joined(FakeNccl(3), monkeypatch, size=3, enters=lambda rank: rank != 1, timeout=0.5)
    assert found[1] == "left"
    for error in (found[0], found[2]):
        assert (
            isinstance(error, moecomm.PeerTimeout)
            and "making its communicator took more than 0.5 s" in str(error)
            and error.op == "Communicator"
        )


def test_one_rank_s_reason_reaches_all(monkeypatch):
    fake = FakeNccl(2)
    for error in joined(fake, monkeypatch, size=2, version=lambda rank: 23203 if rank else 22809):
        assert (
            isinstance(error, moecomm.InvalidArgument)
            and "on rank 0, NCCL 2.28.9" in str(error)
            and error.peer == 0
        )
    for error in joined(fake, monkeypatch, size=2, version=lambda rank: 23203 + rank):
        assert isinstance(
            error, moecomm.InvalidArgument
        ) and "the versions of NCCL by rank are 2.32.3, 2.32.4; expected one version" in str(error)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    for error in joined(fake, monkeypatch, size=2, gpus=["one", "one"]):
        assert isinstance(error, moecomm.InvalidArgument) and "ranks [0, 1] share a GPU" in str(error)
    assert not fake.worlds and fake.made == 0


def raising(error):
    raise error


def test_what_fails_keeps_its_kind():
    assert nccl.bounded(lambda: 7, 1, what="x", rank=0) == 7
    with pytest.raises(moecomm.InvalidArgument, match="joining: no network"):
        nccl.bounded(lambda: raising(ValueError("no network")), 1, what="joining", rank=0)
    with pytest.raises(moecomm.MoecommError, match="joining on rank 3: NCCL: unhandled"):
        nccl.bounded(lambda: raising(RuntimeError("NCCL: unhandled")), 1, what="joining", rank=3)
    with pytest.raises(KeyError):
        nccl.bounded(lambda: raising(KeyError("x")), 1, what="joining", rank=3)


# -- the library's boundary ----------------------------------------------------------------------------------


@pytest.mark.skipif(not BUILT, reason="this build has no CUDA extension")
def test_a_library_without_windows_is_refused_by_name(tmp_path):
    """An old libnccl has only the functions of its version."""
    source = tmp_path / "old.c"
    names = (
        "ncclGetVersion",
        "ncclGetUniqueId",
        "ncclCommInitRank",
        "ncclCommAbort",
        "ncclGetErrorString",
        "ncclMemAlloc",
        "ncclMemFree",
    )
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    old = tmp_path / "libnccl.so.2"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(old)], check=True)
    native = cuda.native()
    if native.nccl_headers() == 0:
        pytest.skip("this build has no NCCL: its headers were not found")
    with pytest.raises(ValueError, match=r"has no ncclCommWindowRegister: it is too old; expected 2\.29"):
        native.nccl_unique_id(str(old).encode())
    with pytest.raises(ValueError, match="cannot open shared object file"):
        native.nccl_unique_id(b"/nowhere/libnccl.so.2")


@pytest.mark.skipif(not BUILT or WHEEL is None, reason="needs the CUDA extension and NCCL's wheel")
def test_unique_ids_of_the_real_library():
    native = cuda.native()
    if native.nccl_headers() == 0:
        pytest.skip("this build has no NCCL: its headers were not found")
    names = {native.nccl_unique_id(WHEEL.encode()) for _ in range(3)}
    assert len(names) == 3 and all(len(n) == 128 for n in names)


# -- on a GPU ------------------------------------------------------------------------------------------------

NO_GPU = cuda.why_not()


@pytest.mark.skipif(NO_GPU is not None, reason=f"needs a GPU: {NO_GPU}")
@pytest.mark.parametrize("fabric", ["ipc", "nccl"])
def test_two_nodes_of_processes_on_one_gpu(fabric):
    """Four processes as two nodes: all results equal the oracle, over CUDA IPC and over NCCL's windows."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
        str(ROOT / "tests/support/cuda_worker.py"),
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT / "tests",
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
            "MOECOMM_CUDA_FABRIC": fabric,
            **MULTI,
            "NCCL_NVLS_ENABLE": "0",
            "NCCL_MAX_CTAS": "2",
        },
        check=False,
    )
    assert run.returncode == 0 and all(f"rank {r} over {fabric} is done" in run.stdout for r in range(4)), (
        run.stdout[-2000:] + run.stderr[-3000:]
    )
