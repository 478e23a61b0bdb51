"""Forked children of a rank, such as DataLoader workers: they may use tensors of its windows, but make no calls."""

import json
import os
import sys
import time
import traceback

import pytest
import torch

import moecomm
from moecomm import record
from moecomm.results import Pending

IDS = torch.tensor([[0, 3]] * 8)


@pytest.fixture
def world():
    """Return (buffer, a dispatch, the result of decode_dispatch) of a single rank."""
    comm = moecomm.Communicator()
    buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8, decode=True)
    out = buf.dispatch(torch.arange(8 * 64).view(8, 64).bfloat16(), IDS, torch.ones(8, 2))
    yield buf, out, buf.decode_dispatch(torch.ones(8, 64).bfloat16(), IDS, quant=None)
    buf.close()
    comm.close()


def in_child(work):
    """Return the result of work() in a forked child, by JSON."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writer)
    with open(reader) as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)


def refusal(call):
    """Return the text of the InvalidArgument that call() raises."""
    try:
        call()
    except moecomm.InvalidArgument as error:
        return str(error)
    return None


def test_a_child_reads_the_windows_tensors(world):
    _buf, out, (recv, hook) = world
    hook()
    want = [
        out.x.float().sum().item(),
        out.topk_weights.sum().item(),
        recv.counts.tolist(),
        out.handle.tensor() is not None,
    ]
    assert (
        in_child(
            lambda: [
                out.x.float().sum().item(),
                out.topk_weights.sum().item(),
                recv.counts.tolist(),
                out.handle.tensor() is not None,
            ]
        )
        == want
    )


def test_what_a_child_writes_stays_there(world):
    buf, out, _ = world
    rows = out.handle.rows.fill_(2)
    assert in_child(lambda: [rows.fill_(5).float().mean().item(), rows.float().mean().item()]) == [5.0, 5.0]
    assert (rows == 2).all() and (out.x.view(-1, 64)[0] == torch.arange(64)).all()
    assert torch.equal(buf.combine(rows, out.handle), torch.full((8, 64), 4.0).bfloat16())


def test_calls_hooks_and_pendings_are_refused_in_a_child(world):
    buf, out, (_, hook) = world
    pending = buf.dispatch(torch.ones(8, 64).bfloat16(), IDS, async_op=True)
    texts = in_child(
        lambda: [
            refusal(call)
            for call in (
                hook,
                lambda: buf.dispatch(out.x[:8], IDS),
                lambda: buf.combine(out.x, out.handle),
                buf.stats,
                buf.comm.barrier,
                buf.comm.duplicate,
            )
        ]
    )
    assert all(text and "parent process" in text for text in texts), texts
    pending.wait()
    waiting = Pending(buf.comm, lambda: time.sleep(0.5), ())  # in progress
    assert "parent process" in in_child(lambda: refusal(waiting.wait))
    hook()  # the parent continues


def test_a_child_ends_like_any_process(world):
    """A child closes the inherited objects, or leaves them to the interpreter, and makes its own world."""
    buf, _out, _ = world

    def work():
        buf.close()
        buf.comm.close()
        with moecomm.Communicator() as comm:
            own = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8)
            return own.dispatch(torch.ones(8, 64).bfloat16(), IDS).x.float().sum().item()

    assert in_child(work) == 2 * 8 * 64
    assert torch.equal(buf.dispatch(torch.ones(8, 64).bfloat16(), IDS).x, torch.ones(16, 64).bfloat16())


def test_a_child_leaves_a_recording_alone(tmp_path):
    comm = moecomm.Communicator()
    buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8, record=tmp_path)
    buf.dispatch(torch.ones(8, 64).bfloat16(), IDS)
    before = sorted(os.listdir(tmp_path))

    def work():
        buf.close()
        return sorted(os.listdir(tmp_path))

    assert in_child(work) == before
    buf.close()
    comm.close()
    assert len(record.load(tmp_path)[0].calls) == 1


def test_workers_of_a_loader_read_the_windows(world):
    _, out, _ = world

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(out.x)

        def __getitem__(self, i):
            return out.x[i].clone()

    batches = list(
        torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork")
    )
    assert torch.equal(torch.cat(batches), out.x)
