"""User code during a call: signal handlers, other threads, hooks and finalizers.

It must never crash or deadlock.
"""

import contextlib
import json
import subprocess
import sys
import threading

import inside_calls
import pytest
import torch
from emulated_gpu import gpu  # noqa: F401 - a fixture

import moecomm

WORLDS = {"node": (2, {}), "tcp": (1, {"UCX_TLS": "tcp,self"})}


def run(processes, folder, world, scenario, *arguments):
    """Return the observations of both ranks."""
    per_node, environment = WORLDS[world]
    ranks = [
        processes.Process(
            target=inside_calls.main, args=(str(folder), r, per_node, environment, scenario, *arguments)
        )
        for r in (0, 1)
    ]
    try:
        for p in ranks:
            p.start()
        for r, p in enumerate(ranks):
            p.join(40)
            assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:
            p.kill()
            p.join()
    return [json.loads((folder / f"{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.parametrize("world", WORLDS)
def test_a_call_from_a_signal_handler_is_refused(processes, tmp_path, world):
    """The call would wait for the call that the handler interrupts, which then continues normally."""
    refused = run(processes, tmp_path, world, "every_verb")[0]
    for verb, tried in refused.items():
        assert len(tried) == 8, f"in {verb}: {tried}"
        for what, error in tried[1:]:
            assert (
                error and error["type"] == "InvalidArgument" and "this thread is inside" in error["text"]
            ), f"{what} in {verb}: {error}"
            assert error["rank"] == 0
        assert ("decode" in verb) == (
            "inside the hook of decode" in tried[1][1]["text"] or "inside decode" in tried[1][1]["text"]
        ), tried[1]


def test_a_handler_does_not_wait_for_a_call_that_cannot_begin(processes, tmp_path):
    error = run(processes, tmp_path, "node", "pending")[0]["error"]
    assert error["type"] == "InvalidArgument" and error["text"].startswith(
        "wait: this thread is inside the hook of decode_dispatch"
    ), error


@pytest.mark.parametrize(
    "world,verb,thread,everything",
    [
        ("node", "dispatch", False, False),
        ("node", "dispatch", True, True),
        ("node", "combine", False, True),
        ("node", "decode_hook", False, True),
        ("node", "decode_dispatch", True, False),
        ("node", "asynchronous", True, True),
        ("tcp", "dispatch", False, True),
        ("tcp", "combine", True, True),
    ],
)
def test_close_in_the_middle_of_a_call(processes, tmp_path, world, verb, thread, everything):
    seen = run(processes, tmp_path, world, "close", verb, thread, everything)
    for rank, s in enumerate(seen):
        for again in ("dispatch", "asynchronous"):
            assert s[again]["type"] == "InvalidArgument" and "is closed" in s[again]["text"], (
                f"rank {rank}: {s}"
            )
        assert s["rows"] and s["after"] < s["before"], f"rank {rank}: {s}"
    if thread:  # it waited for the call, which ends after rank 1 has come
        assert seen[0]["closed"] > seen[1]["called"], seen


def test_the_garbage_collector_runs_in_the_middle_of_a_call(processes, tmp_path):
    for s in run(processes, tmp_path, "tcp", "collect"):
        assert s["after"] < s["before"], s


def test_a_handler_closes_and_leaves(processes, tmp_path):
    left, other = run(processes, tmp_path, "node", "leave")
    assert left == {"exit": 7, "closed": True}
    assert other["error"]["type"] == "PeerLost" and other["error"]["peer"] == 0, other


def test_a_hook_closes_the_buffer(processes, tmp_path):
    for s in run(processes, tmp_path, "node", "hook"):
        assert s["error"]["type"] == "InvalidArgument" and s["error"]["text"].endswith(
            "the buffer is closed"
        ), s


def test_a_hook_of_a_rank_thread_closes_the_buffer():
    def main(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8)
        buf.register_hook("pre_dispatch", lambda _: buf.close())
        with pytest.raises(moecomm.InvalidArgument, match="the buffer is closed"):
            buf.dispatch(torch.ones(8, 64).bfloat16(), torch.tensor([[0, 3]] * 8))

    moecomm.run_local(main, 2)


def test_threads_share_a_buffer():
    """With a single rank, any order of calls is valid: all results of dispatch, combine and decode must be correct."""
    comm = moecomm.Communicator()
    buf = moecomm.Buffer(
        comm, hidden=64, num_experts=4, top_k=2, max_tokens=8, arena_bytes=1 << 20, decode=True
    )
    wrong = []

    def work(number):
        x, ids = torch.full((8, 64), float(number)).bfloat16(), torch.tensor([[0, 3]] * 8)
        for step in range(60):
            out = buf.dispatch(x, ids, async_op=step % 7 == 0)
            out = out if step % 7 else out.wait()
            y = buf.combine(out.x.clone(), out.handle)
            if not (out.x == number).all() or not (y == 2 * number).all():
                wrong.append((number, step))
            handle = buf.decode_dispatch(x, ids, quant=None, return_hook=False)[0].handle
            with contextlib.suppress(
                moecomm.InvalidArgument
            ):  # other threads have made two dispatches since then
                buf.decode_combine(handle.rows, ids, None, handle, return_hook=False)

    threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    buf.close()
    comm.close()
    assert not wrong


def test_the_interpreter_ends_with_a_call_under_way():
    program = """if True:
        import threading, time, torch, moecomm
        inside = threading.Event()
        def rank(comm):
            buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8)
            if comm.rank == 0:
                inside.set()
                buf.dispatch(torch.ones(8, 64).bfloat16(), torch.tensor([[0, 3]] * 8))
            time.sleep(60)
        threading.Thread(target=moecomm.run_local, args=(rank, 2), daemon=True).start()
        inside.wait(30)
        time.sleep(0.2)
    """
    ended = subprocess.run(
        [sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_cuda_calls_from_within_a_call_are_refused(gpu):  # noqa: F811
    """Code that runs during a launch (a signal handler) gets an error; close() waits for the end of the call."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=64, num_experts=2, top_k=2, max_tokens=8, num_sms=2)
        x, ids = torch.ones(8, 64).bfloat16(), torch.tensor([[0, 1]] * 8)
        native, refused = buf.backend.memory.native, []
        enqueue = native._enqueue

        def interrupted(call, *args):
            for inner in (
                buf.stats,
                lambda: buf.dispatch(x, ids),
                lambda: buf.decode_dispatch(x, ids, quant=None),
            ):
                with pytest.raises(moecomm.InvalidArgument, match="this thread is inside dispatch"):
                    inner()
            native.release()
            refused.append(True)
            return enqueue(call, *args)

        buf.decode_dispatch(x, ids, quant=None)[1]()
        native._enqueue = interrupted
        out = buf.dispatch(x, ids)
        native._enqueue = enqueue
        with pytest.raises(moecomm.InvalidArgument, match="the buffer is closed"):
            buf.dispatch(x, ids)
        return refused, float(out.x.float().mean())

    assert moecomm.run_local(main, 1, device="cuda:0") == [([True], 1.0)]
