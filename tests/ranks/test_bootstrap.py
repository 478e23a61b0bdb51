"""Ranks that find each other: deaths, delays and odd arguments in every collective call become typed errors
that name the rank.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import joining
import pytest
import torch

import moecomm
from moecomm import launch, mesh
from moecomm.encoding import decode, encode
from moecomm.sockets import Endpoint


def run(processes, folder, size, main, *arguments, without=None):
    """What every rank has written, by rank."""
    ranks = [processes.Process(target=main, args=(str(folder), r, size, *arguments)) for r in range(size)]
    for p in ranks:
        p.start()
    try:
        deadline = time.monotonic() + 100
        for r, p in enumerate(ranks):
            if r != without:
                p.join(max(0, deadline - time.monotonic()))
                assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:
            p.kill()
            p.join()
    return [None if r == without else json.loads((folder / f"{r}.json").read_text()) for r in range(size)]


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(
    "verb,number",
    [
        ("Communicator", 0),
        ("Communicator", 1),
        ("Communicator", 2),
        ("Buffer", 1),
        ("Buffer", 3),
        ("duplicate", 0),
        ("duplicate", 1),
        ("migrate", 2),
        ("migrate", 6),
        ("barrier", 1),
        ("barrier", 2),
    ],
)
def test_a_rank_is_killed(processes, tmp_path, verb, number, victim):
    """Every survivor learns at once who it was, also where that was rank 0, and goes on without it."""
    for seen in filter(
        None, run(processes, tmp_path, 3, joining.killed, verb, victim, number, without=victim)
    ):
        error = seen["error"]
        assert (
            error is not None
            and error["type"] == "PeerLost"
            and error["peer"] == victim
            and f"rank {victim}" in error["text"]
        ), seen
        assert seen["seconds"] < joining.TIMEOUT / 2
        assert verb == "Communicator" or seen["left"][1] == 2


def test_a_rank_that_does_not_come_is_named_within_the_timeout(processes, tmp_path):
    """The torch group's own timeout is half an hour."""
    first, second = run(processes, tmp_path, 2, joining.late)
    for verb, seen in first.items():
        error = seen["error"]
        assert (
            error is not None
            and error["type"] == "PeerTimeout"
            and error["peer"] == 1
            and "rank 1 has not come within 0.75 s" in error["text"]
        ), (verb, seen)
        assert seen["seconds"] < 30
    for verb, seen in second.items():  # which comes when nobody waits any more
        assert seen["error"] is not None and seen["error"]["type"] in ("PeerTimeout", "PeerLost"), (
            verb,
            seen,
        )


def test_ctrl_c_is_answered_and_told(processes, tmp_path):
    first, second = run(processes, tmp_path, 2, joining.interrupted)
    assert first["seconds"] < joining.TIMEOUT / 2
    assert (
        second["error"]["type"] == "PeerLost"
        and second["error"]["peer"] == 0
        and "interrupted by KeyboardInterrupt" in second["error"]["text"]
    )


def test_parts(processes, tmp_path):
    """duplicate and shrink bind to nothing of torch's, leave no descriptor or thread, and are refused where
    ranks disagree.
    """
    everyone = run(processes, tmp_path, 4, joining.parts)
    for rank, seen in enumerate(everyone):
        before, after = seen["held"]
        assert before == after, f"descriptors and threads of rank {rank}"
        assert seen.get("left") == ([rank, 3] if rank < 3 else None)
        error = seen["other list"]["error"]
        assert error is not None and error["type"] in ("ConfigMismatch", "InvalidArgument"), seen
        assert "makes a communicator of ranks" in error["text"] or "alive is" in error["text"], seen
        error = seen["bad list"]["error"]
        assert (
            error["type"] == "InvalidArgument"
            and error["peer"] in (1, None)
            and "alive is [0, 1, 'x']" in error["text"]
        ), seen
        error = seen["other call"]["error"]
        assert (
            error["type"] == "ConfigMismatch"
            and "collective call" in error["text"]
            and "barrier" in error["text"]
        ), seen
        assert (
            max(seen[name]["seconds"] for name in ("other list", "bad list", "other call"))
            < joining.TIMEOUT / 2
        )


class Threads:
    """A group whose ranks are threads, for meshes of them."""

    def __init__(self, size):
        self.points = [Endpoint() for _ in range(size)]
        self.cards = [p.card() for p in self.points]

    def run(self, main, timeout=30.0):
        """main(mesh) of every rank, at once: what it returned or raised."""
        found = [None] * len(self.points)

        def rank_main(r):
            try:
                found[r] = main(mesh.Mesh(self.points[r], self.cards, range(len(self.points)), r, timeout))
            except moecomm.MoecommError as error:
                found[r] = error

        threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(len(self.points))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return found


@pytest.mark.parametrize("most", [mesh.ALL_TO_ALL, 3])
def test_many_ranks(monkeypatch, most):
    """Everyone's bytes, and the news of a death, reach everyone where not everyone is connected to everyone."""
    monkeypatch.setattr(mesh, "ALL_TO_ALL", most)
    size = 11
    assert len(mesh.neighbors(0, size)) == (10 if most > size else 8)

    def main(m):
        for i in range(4):
            expected = [bytes([i, r]) * (1 + 40_000 * (r == 3)) for r in range(size)]
            assert m.allgather(expected[m.rank]) == expected
        part = m.subset([r for r in range(size) if r % 2 == m.rank % 2])
        assert part.allgather(bytes([m.rank])) == [bytes([r]) for r in range(m.rank % 2, size, 2)]
        part.close()
        if m.rank == 5:
            for line in m._lines.values():
                line.close()  # as a death does: no goodbye
            return None
        return m.allgather(b"")

    for r, error in enumerate(Threads(size).run(main)):
        if r != 5:
            assert isinstance(error, moecomm.PeerLost) and error.peer == 5, (r, error)


def test_news_of_an_attempt_that_has_ended_is_no_news():
    """A rank tried to make a part alone and failed. After an exchange of all ranks the next attempt starts clean."""

    def main(m):
        if m.rank == 1:
            m._timeout, timeout = 0.2, m._timeout
            with pytest.raises(moecomm.PeerTimeout):
                m.subset([0, 1])
            m.refuse([0], "not this one")
            m._timeout = timeout
        m.allgather(b"")
        return m.subset([0, 1]).allgather(bytes([m.rank]))

    assert Threads(2).run(main) == [[b"\0", b"\1"]] * 2


def test_strangers_are_ignored():
    """Who does not know the token of a rank is no rank; half a hello holds nobody up."""
    group = Threads(2)
    from moecomm.sockets import HELLO, Line, dial

    lines = [Line(dial(group.points[0].address_in(group.cards[0]))) for _ in range(3)]
    fields = {
        "name": "all",
        "parent": "",
        "from": 1,
        "to": 0,
        "ranks": [0, 1],
        "nonce": "",
        "refused": None,
        "signature": "0" * 64,
    }
    lines[0].put(HELLO, 0, 1, json.dumps(fields).encode())
    lines[1].put(HELLO, 0, 1, b"\xff{")
    lines[2].socket.send(b"\x03")
    assert group.run(lambda m: m.allgather(bytes([m.rank]))) == [[b"\0", b"\1"]] * 2


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -7,
        1 << 80,
        0.1,
        float("inf"),
        "\u2713 \ud800",
        b"\0\xff",
        [1, [2.5]],
        {},
        {"a": None, 3: [b"x"], None: {"base64": "no"}},
    ],
)
def test_encoding(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize("value", [object(), {"a": lambda: 0}, torch.ones(1), {1, 2}])
def test_what_cannot_be_sent(value):
    with pytest.raises(moecomm.InvalidArgument, match="cannot be sent to the other ranks"):
        encode(value)
    nested = []
    nested.append(nested)
    with pytest.raises(moecomm.InvalidArgument, match="nested too deeply"):
        encode(nested)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04N.",
        b"{",
        b'{"base64":"?"}',
        b'{"base64":3}',
        b'{"pairs":[[1]]}',
        b'{"pairs":[[[],1]]}',
        b'{"a":1,"b":2}',
        b"{}",
        b'{"what":1}',
        b"[" * 5000,
    ],
)
def test_what_no_peer_sends(data):
    with pytest.raises(moecomm.MoecommError, match="no value of moecomm's"):
        decode(data)


# -- one rank's odd argument ------------------------------------------------------------------------

GOOD = dict(hidden=64, num_experts=12, top_k=2, max_tokens=8)


class Unprintable:
    """As an argument may be."""

    def __repr__(self):
        raise ValueError("no repr")


def buffer(**options):
    return lambda comm, buf: moecomm.Buffer(comm, **{**GOOD, **options})


def use(placement):
    return lambda comm, buf: buf.use(placement)


def migrate(weights):
    return lambda comm, buf: joining.tables(1, 2)[1].migrate(weights, comm).wait()


FIRST = joining.tables(1, 2)[0]
SERVES = buffer(placement=FIRST)
ODD = {  # name: (what rank 1 does, what rank 0 does, what the message says)
    "hidden": (buffer(hidden=None), buffer(), "hidden is None"),
    "unprintable": (buffer(hidden=Unprintable()), buffer(), "rank 1 failed: ValueError: no repr"),
    "dtype": (buffer(dtype=[]), buffer(), r"dtype is \[\]"),
    "record": (buffer(record=5), buffer(), "record"),
    "record unprintable": (buffer(record=Unprintable()), buffer(), "rank 1"),
    "record nul": (buffer(record="a\0b"), buffer(), "rank 1"),
    "placement": (buffer(placement=5), buffer(), "placement is 5"),
    "monitor": (buffer(placement=FIRST, monitor=5), SERVES, "monitor is 5; expected a LoadMonitor"),
    "replicas": (buffer(placement=FIRST, replicas=[]), SERVES, r"replicas is \[\]"),
    "activate": (buffer(placement=FIRST, activate="2"), SERVES, "activate is '2'"),
    "decode": (buffer(decode="yes"), buffer(), "decode is a str; expected True or False"),
    "decode no value": (buffer(decode=lambda: 0), buffer(), "decode is a function; expected True or False"),
    "decode tensor": (
        buffer(decode=torch.tensor([1, 2])),
        buffer(),
        "decode is a Tensor; expected True or False",
    ),
    "channels": (buffer(channels=10**9), buffer(), "channels is 1000000000"),
    "use shape": (use(joining.tables(1, 3)[0]), use(joining.tables(3, 2)[0]), "use: placement is"),
    "use kind": (use(7), use(joining.tables(3, 2)[0]), "use: placement is 7"),
    "migrate shape": (
        migrate([torch.zeros(2, 3)]),
        migrate([torch.zeros(6, 3)]),
        r"weights\[0\] is 'torch.float32 .*\[2, 3\]",
    ),
    "migrate stride": (migrate([torch.zeros(3, 6).t()]), migrate([torch.zeros(6, 3)]), r"weights\[0\] is"),
    "migrate none": (migrate(None), migrate([torch.zeros(6, 3)]), "weights is 'NoneType'"),
    "migrate sparse": (
        migrate([torch.zeros(6, 3).to_sparse()]),
        migrate([torch.zeros(6, 3)]),
        r"weights\[0\] is torch.sparse_coo; expected a dense tensor",
    ),
    "migrate kind": (migrate(["rows"]), migrate([torch.zeros(6, 3)]), r"weights\[0\] is 'str'"),
    "shrink": (
        lambda comm, buf: comm.shrink([0, 1, "x"]),
        lambda comm, buf: comm.shrink([0, 1]),
        r"alive is \[0, 1, 'x'\]",
    ),
    "shrink none": (
        lambda comm, buf: comm.shrink(None),
        lambda comm, buf: comm.shrink([0, 1]),
        "alive is None",
    ),
    "shrink unprintable": (
        lambda comm, buf: comm.shrink([Unprintable()]),
        lambda comm, buf: comm.shrink([0, 1]),
        "alive is",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_argument_of_one_rank(name):
    """Both ranks raise what is wrong, long before the timeout, and the communicator stays usable."""
    odd, good, message = ODD[name]

    def main(comm):
        buf = moecomm.Buffer(comm, **GOOD, placement=FIRST) if name.startswith("use") else None
        with pytest.raises(moecomm.MoecommError, match=message) as raised:
            (odd if comm.rank == 1 else good)(comm, buf)
        assert not isinstance(raised.value, (moecomm.PeerLost, moecomm.PeerTimeout))
        assert comm.rank == 1 or raised.value.peer == 1
        comm.barrier()
        if buf is not None:
            buf.use(joining.tables(3, 2)[0])

    moecomm.run_local(main, 2, timeout=60)


def test_odd_arguments_over_processes(processes, tmp_path):
    """The same between processes."""
    for rank, seen in enumerate(run(processes, tmp_path, 2, odd_arguments)):
        for name, outcome in seen.items():
            error = outcome["error"]
            assert (
                error is not None
                and error["type"] not in ("PeerLost", "PeerTimeout")
                and outcome["seconds"] < joining.TIMEOUT / 2
            ), (rank, name, outcome)
            assert rank == 1 or error["peer"] == 1, (name, outcome)
        assert seen.keys() == ODD.keys()


def odd_arguments(folder, rank, size):
    """What a rank saw of each."""
    comm = moecomm.Communicator(
        joining.group(folder, "store", rank, size), ranks_per_node=2, timeout=joining.TIMEOUT
    )
    buf = moecomm.Buffer(comm, **GOOD, placement=FIRST)
    seen = {
        name: joining.attempt(lambda odd=odd, good=good: (odd if rank == 1 else good)(comm, buf))
        for name, (odd, good, _) in ODD.items()
    }
    comm.barrier()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(seen, file)


# -- what the environment says ----------------------------------------------------------------------

ENV = {"RANK": "{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT"}
STEP = {
    "SLURM_PROCID": "{rank}",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NUM_NODES": "1",
    "MASTER_PORT": "PORT",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize(
    "environment,initialized,error",
    [
        ({}, True, None),
        (ENV, False, None),
        (ENV, True, None),
        (STEP, False, None),
        (
            {"RANK": "{rank}", "WORLD_SIZE": "2"},
            False,
            "would be alone in what looks like a launched job: RANK and WORLD_SIZE .* MASTER_ADDR and "
            "MASTER_PORT cannot be known",
        ),
        (
            {**ENV, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
            True,
            r"default group.*rank \d of 2.* and OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE .*rank 0 of "
            r"4.* contradict",
        ),
        (
            {**ENV, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "MOECOMM_GROUP": "torch"},
            True,
            None,
        ),
    ],
    ids=["initialized", "RANK", "both", "srun", "no address", "contradiction", "chosen"],
)
def test_communicator_without_a_group(processes, tmp_path, environment, initialized, error):
    environment = {k: free_port() if v == "PORT" else v for k, v in environment.items()}
    for rank, seen in enumerate(run(processes, tmp_path, 2, joining.found, environment, initialized)):
        if error is None:
            assert seen["error"] is None and seen["world"] == [rank, 2], seen
        else:
            assert (
                seen["error"]["type"] == "InvalidArgument"
                and re.search(error, seen["error"]["text"])
                and "MOECOMM_GROUP" in seen["error"]["text"]
            ), seen


@pytest.mark.parametrize(
    "environment,error",
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        (
            {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
            None,
        ),  # the shell of salloc
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MOECOMM_GROUP": "alone"}, None),
        ({"RANK": "0"}, "RANK .*looks|launched job: RANK"),
        ({"WORLD_SIZE": "4"}, "launched job: WORLD_SIZE"),
        ({"RAY_RAYLET_PID": "1"}, "launched job: RAY_RAYLET_PID"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4"},
            "RANK and WORLD_SIZE .* and OMPI_COMM_WORLD_SIZE .* contradict",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, "contradict"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "is no rank of its world"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK: got 'zero'"),
        (
            {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
            "launched job: SLURM_PROCID",
        ),
        ({"MOECOMM_GROUP": "torch"}, "default group is not initialized"),
        ({"MOECOMM_GROUP": "slurm"}, "no variable of such a launcher"),
        ({"MOECOMM_GROUP": "all"}, "MOECOMM_GROUP: got 'all'"),
    ],
)
def test_alone(monkeypatch, environment, error):
    """One rank where nobody says otherwise; never by mistake."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if error is None:
        with moecomm.Communicator() as comm:
            assert comm.size == 1
    else:
        with pytest.raises(moecomm.InvalidArgument, match=error):
            moecomm.Communicator()
    with (
        moecomm.Communicator("alone")
        if environment.get("MOECOMM_GROUP") != "all"
        else contextlib.nullcontext() as comm
    ):
        assert comm is None or comm.size == 1


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("node07", "node07"),
        ("a1,b2", "a1"),
        ("node[07-12,20],other3", "node07"),
        ("n[1,3]-ib", "n1-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes, first):
    assert launch.first_host(nodes) == first


def test_a_mesh_of_devices(tmp_path):
    """One dimension is a group; more are refused by name."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        both = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
        with moecomm.Communicator(both["ep"]) as comm:
            assert comm.size == 1
        with pytest.raises(moecomm.InvalidArgument, match=r"DeviceMesh of 2 dimensions \('dp', 'ep'\)"):
            moecomm.Communicator(both)
        with pytest.raises(moecomm.InvalidArgument, match="NON_GROUP_MEMBER"):
            moecomm.Communicator(dist.GroupMember.NON_GROUP_MEMBER)
    finally:
        dist.destroy_process_group()


# -- namespaces -------------------------------------------------------------------------------------


def test_two_pid_namespaces(tmp_path):
    """Process numbers of one mean nothing in the other: such ranks are two nodes.

    Were they taken for one, the window's nonce would tell.
    """
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        possible = subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("pid namespaces: not permitted here")
    code = "import sys; sys.path.insert(0, 'tests'); import joining; joining.apart(*sys.argv[1:])"
    ranks = [
        subprocess.Popen(
            [*unshare, sys.executable, "-c", code, str(tmp_path), str(r)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    for p in ranks:
        output = p.communicate(timeout=100)[0]
        assert p.returncode == 0, output
    for r in range(2):
        seen = json.loads((tmp_path / f"{r}.json").read_text())
        assert seen["as it is"] is None and seen["nodes"] == [2, 1] and seen["rows"] == [0.0, 1.0], seen
        assert seen["mistaken"] is not None and "pid namespace" in seen["mistaken"]["text"], seen
