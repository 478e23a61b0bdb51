"""The bootstrap: deaths, delays and invalid arguments in collective calls become typed errors that name the rank."""

import json
import re
import threading

import joining
import pytest
import torch

import moecomm
from moecomm import mesh
from moecomm._bootstrap.generations import GenerationMesh
from moecomm.sockets import Endpoint


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
    """Every survivor learns at once which rank died, also if it was rank 0, and continues without it."""
    for seen in filter(
        None, joining.run(processes, tmp_path, 3, joining.killed, verb, victim, number, without=victim)
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
    """The error comes within moecomm's timeout, although that of the torch group is half an hour."""
    first, second = joining.run(processes, tmp_path, 2, joining.late)
    for verb, seen in first.items():
        error = seen["error"]
        assert (
            error is not None
            and error["type"] == "PeerTimeout"
            and error["peer"] == 1
            and re.search(r"rank 1 has not made .* within 0.75 s", error["text"])
        ), (verb, seen)
        assert seen["seconds"] < 30
    for verb, seen in second.items():  # no rank waits for it any more
        assert seen["error"] is not None and seen["error"]["type"] in ("PeerTimeout", "PeerLost"), (
            verb,
            seen,
        )


def test_ctrl_c_is_answered_and_told(processes, tmp_path):
    first, second = joining.run(processes, tmp_path, 2, joining.interrupted)
    assert first["seconds"] < joining.TIMEOUT / 2
    assert (
        second["error"]["type"] == "PeerLost"
        and second["error"]["peer"] == 0
        and "interrupted by KeyboardInterrupt" in second["error"]["text"]
    )


def test_parts(processes, tmp_path):
    """duplicate and shrink do not use torch, leak no file descriptors or threads, and are refused if ranks disagree."""
    everyone = joining.run(processes, tmp_path, 4, joining.parts)
    for rank, seen in enumerate(everyone):
        before, after = seen["held"]
        assert before == after, f"descriptors and threads of rank {rank}"
        assert seen.get("left") == ([rank, 3] if rank < 3 else None)
        error = seen["other list"]["error"]
        assert error is not None and error["type"] in ("ConfigMismatch", "InvalidArgument"), seen
        assert "in the numbers of the first communicator" in error["text"] or "alive is" in error["text"], (
            seen
        )
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
    """A group of rank threads."""

    def __init__(self, size):
        self.points = [Endpoint() for _ in range(size)]
        self.contacts = [p.contact() for p in self.points]

    def run(self, main, timeout=30.0):
        """Call main(mesh) on all ranks concurrently; return the results or exceptions."""
        found = [None] * len(self.points)

        def rank_main(r):
            try:
                found[r] = main(mesh.Mesh(self.points[r], self.contacts, range(len(self.points)), r, timeout))
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
    """Messages and the report of a death reach all ranks, although not all pairs are connected."""
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
                line.close()  # like a death: no final message
            return None
        return m.allgather(b"")

    for r, error in enumerate(Threads(size).run(main)):
        if r != 5:
            assert isinstance(error, moecomm.PeerLost) and error.peer == 5, (r, error)


def test_more_ranks_agree_than_a_word_has_bits(monkeypatch):
    """All are connected to all, so the death of one is certain for each."""
    monkeypatch.setattr(mesh, "Mesh", GenerationMesh)
    size = 70

    def main(m):
        m.allgather(b"")
        if m.rank == 66:
            for line in m._lines.values():
                line.close()  # as a death does
            return None
        return m.agree([m.rank])

    want = {r: [r] for r in range(size) if r != 66}
    assert Threads(size).run(main) == [None if r == 66 else want for r in range(size)]


def test_news_of_an_attempt_that_has_ended_is_no_news():
    """One rank fails alone to make a part. After an exchange of all ranks, the next attempt starts clean."""

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
    """A connection without the token of the group is not a rank, and an incomplete hello blocks nothing."""
    group = Threads(2)
    from moecomm.sockets import HELLO, Line, dial

    lines = [Line(dial(group.points[0].address_in(group.contacts[0]))) for _ in range(3)]
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


# -- one rank's odd argument ------------------------------------------------------------------------

GOOD = dict(hidden=64, num_experts=12, top_k=2, max_tokens=8)


class Unprintable:
    """An argument without a repr."""

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
ODD = {  # name: (call of rank 1, call of rank 0, pattern of the message)
    "hidden": (buffer(hidden="x"), buffer(), "hidden is .x."),
    "unprintable": (buffer(hidden=Unprintable()), buffer(), "rank 1 failed: ValueError: no repr"),
    "dtype": (buffer(dtype=[]), buffer(), r"dtype is \[\]"),
    "record": (buffer(record=5), buffer(), "record"),
    "record unprintable": (buffer(record=Unprintable()), buffer(), "rank 1"),
    "record nul": (buffer(record="a\0b"), buffer(), "rank 1"),
    "placement": (buffer(placement=5), buffer(), "placement is 5"),
    "monitor": (buffer(placement=FIRST, monitor=5), SERVES, "monitor is 5; expected a LoadMonitor"),
    "replicas": (buffer(placement=FIRST, replicas=[]), SERVES, r"replicas is \[\]"),
    "activate": (buffer(placement=FIRST, activate="2"), SERVES, "activate is '2'"),
    "replicas alone": (buffer(replicas="most"), buffer(), "replicas is 'most'; expected one of 'local'"),
    "activate alone": (
        buffer(activate=1),
        buffer(),
        "activate is 1; expected None, or a placement= beside it",
    ),
    "monitor alone": (buffer(monitor=[]), buffer(), r"monitor is \[\]; expected None, or a placement="),
    "renormalize": (buffer(renormalize=1), buffer(), "renormalize is a int; expected True or False"),
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
    """Both ranks raise the error long before the timeout, and the communicator stays usable."""
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
    for rank, seen in enumerate(joining.run(processes, tmp_path, 2, odd_arguments)):
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
    """Return the observations of a rank for each argument."""
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


# -- namespaces -------------------------------------------------------------------------------------
