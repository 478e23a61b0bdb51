"""Waits without a deadline: they last while the peer lives, and end when it dies, stops or closes its communicator."""

import json

import patient
import pytest

import moecomm

# patience, what the late rank does, ranks of a node, the error that the other one gets
CASES = [
    ("deadline", "comes late", 2, "PeerTimeout"),
    ("alive", "comes late", 2, None),
    ("alive", "comes late", 1, None),
    ("alive", "dies", 2, "PeerLost"),
    ("alive", "dies", 1, "PeerLost"),
    ("alive", "stops", 2, "PeerTimeout"),
    ("alive", "closes", 2, "PeerTimeout"),
]


def test_a_wait_lasts_while_its_peer_lives(processes, tmp_path):
    ranks = []
    for number, (patience, what, per_node, _) in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        for rank in range(patient.SIZE):
            arguments = str(folder), rank, per_node, patience, what
            ranks.append(processes.Process(target=patient.main, args=arguments))
            ranks[-1].start()
    waiting = [p for number, p in enumerate(ranks) if number % patient.SIZE != patient.LATE]
    for p in waiting:
        p.join(90)
    ended = [p.exitcode for p in waiting]
    for p in ranks:
        p.kill()
        p.join()
    assert ended == [0] * len(CASES), f"ended with {ended} (None: it hangs)"
    for number, (patience, what, per_node, error) in enumerate(CASES):
        seen = json.loads((tmp_path / str(number) / "0.json").read_text())
        assert seen["type"] == error, (patience, what, per_node, seen)
        assert error is None or seen["peer"] == patient.LATE


@pytest.mark.parametrize("patience", ["forever", None, 3])
def test_wrong_patience(patience):
    with pytest.raises(moecomm.InvalidArgument, match=r'patience: got .*; expected "deadline" or "alive"'):
        moecomm.Communicator("alone", patience=patience)
    assert moecomm.Communicator("alone", patience="alive").patience == "alive"


def test_duplicates_are_as_patient():
    with moecomm.Communicator("alone", patience="alive") as comm, comm.duplicate() as twin:
        assert twin.patience == "alive"
    with pytest.raises(moecomm.InvalidArgument, match="patience: got 'alive' for rank threads"):
        moecomm.run_local(lambda comm: moecomm.Communicator(comm.bootstrap, patience="alive"), 2)
