"""The timeout of a wait: the argument, else MOECOMM_TIMEOUT, else 120 seconds."""

import time

import joining
import pytest
import torch

import moecomm


def test_default(monkeypatch):
    monkeypatch.delenv("MOECOMM_TIMEOUT", raising=False)
    assert moecomm.Communicator("alone").timeout == 120
    assert moecomm.run_local(lambda comm: comm.timeout, 2) == [120, 120]
    assert moecomm.run_local(lambda comm: comm.timeout, 2, timeout=7) == [7, 7]


def test_variable(monkeypatch):
    monkeypatch.setenv("MOECOMM_TIMEOUT", "45.5")
    assert moecomm.Communicator("alone").timeout == 45.5
    assert moecomm.Communicator("alone", timeout=9).timeout == 9
    assert moecomm.run_local(lambda comm: comm.duplicate().timeout, 2) == [45.5, 45.5]


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon", "10000001"])
def test_wrong_variable(monkeypatch, text):
    monkeypatch.setenv("MOECOMM_TIMEOUT", text)
    for make in (lambda: moecomm.Communicator("alone"), lambda: moecomm.run_local(lambda comm: None, 2)):
        with pytest.raises(moecomm.InvalidArgument, match=f"MOECOMM_TIMEOUT is '{text}'.*seconds"):
            make()


@pytest.mark.parametrize(
    "texts,error,said",
    [
        (("30", "never"), "InvalidArgument", "MOECOMM_TIMEOUT is 'never'"),
        (("30", "50"), "ConfigMismatch", "timeout differs between ranks: rank 0 has 30.0, rank 1 has 50.0"),
    ],
)
def test_one_rank_has_another(processes, tmp_path, texts, error, said):
    for seen in joining.run(processes, tmp_path, 2, joining.with_timeout, texts):
        assert seen["error"]["type"] == error and said in seen["error"]["text"], seen


def test_wait_ends(monkeypatch):
    """The variable limits a wait: rank 0 never calls."""
    monkeypatch.setenv("MOECOMM_TIMEOUT", "1")

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=2, top_k=1, max_tokens=4)
        comm.barrier()
        if comm.rank == 0:
            time.sleep(2.5)
            return
        began = time.monotonic()
        with pytest.raises(moecomm.PeerTimeout) as raised:
            buf.dispatch(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64))
        assert raised.value.peer == 0 and time.monotonic() - began < 20

    moecomm.run_local(main, 2)
