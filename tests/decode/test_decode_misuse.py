"""Errors of the decode path: invalid arguments, ranks that disagree, ranks that die."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from decode_steps import check_step, make_buffer
from worlds import random_world

import moecomm

# -- misuse ------------------------------------------------------------------------------------------


def test_misuse_is_refused_and_the_buffer_stays_good():
    world = random_world(2, 4, 64, 8, 3, seed=2, masked=0)

    def main(comm):
        buf, other = make_buffer(comm, world), make_buffer(comm, world)
        xs, ids, weights = (part[comm.rank] for part in world)

        def refused(match, call):
            with pytest.raises(moecomm.InvalidArgument, match=match) as raised:
                call()
            assert raised.value.op.startswith("decode")

        bad, twice = ids.clone(), ids.clone()
        bad[2, 1], twice[3, 2] = 8, twice[3, 0]
        refused("combine: there was no decode_dispatch", lambda: buf.decode_combine(xs, ids, weights, None))
        for inputs, match in [
            ((xs[:, :32], ids), "x is"),
            ((xs.float(), ids), "x is"),
            ((xs, ids[:3]), "topk_ids is"),
            ((xs, ids.float()), "topk_ids is"),
            (
                (torch.zeros(9, 64).bfloat16(), torch.zeros(9, 3).long()),
                "9 tokens; expected at most decode_max_tokens = 8",
            ),
            ((xs, bad), "expert id 8 is out of range in token 2"),
            ((xs, twice), "picked twice in token 3"),
        ]:
            refused(match, lambda inputs=inputs: buf.decode_dispatch(*inputs, quant=None))
        refused("topk_weights is", lambda: buf.decode_dispatch(xs, ids, topk_weights=weights[:2], quant=None))
        refused("quant is 'int4'", lambda: buf.decode_dispatch(xs, ids, quant="int4"))
        refused("scale_layout is 'diagonal'", lambda: buf.decode_dispatch(xs, ids, scale_layout="diagonal"))

        def refused_combine(match, call):
            recv, _ = buf.decode_dispatch(xs, ids, quant=None, return_hook=False)
            refused(match, lambda: call(recv))
            refused(
                "this rank has refused its combine",
                lambda: buf.decode_combine(recv.handle.rows, ids, weights, recv.handle),
            )  # a refusal ends the step

        recv, _ = buf.decode_dispatch(xs, ids, quant=None)
        refused("has not been received", lambda: buf.decode_combine(recv.x, ids, weights, recv.handle))
        recv, _ = buf.decode_dispatch(xs, ids, quant=None, return_hook=False)
        buf.decode_combine(recv.handle.rows, ids, weights, recv.handle)
        refused("is being combined", lambda: buf.decode_combine(recv.handle.rows, ids, weights, recv.handle))
        refused_combine("handle is a", lambda recv: buf.decode_combine(recv.x, ids, weights, "handle"))
        recv, _ = buf.decode_dispatch(xs, ids, quant=None, return_hook=False)
        other.decode_dispatch(xs, ids, quant=None, return_hook=False)
        refused("this buffer", lambda: other.decode_combine(recv.x, ids, weights, recv.handle))
        buf.decode_combine(recv.x, ids, weights, recv.handle, return_hook=False)
        refused_combine("rows is", lambda recv: buf.decode_combine(recv.x[:1], ids, weights, recv.handle))
        refused_combine(
            "topk_weights is", lambda recv: buf.decode_combine(recv.x, ids, weights.double(), recv.handle)
        )
        refused_combine("topk_ids is", lambda recv: buf.decode_combine(recv.x, ids[:1], weights, recv.handle))
        refused_combine(
            "topk_ids of token 0 differ",
            lambda recv: buf.decode_combine(
                recv.handle.rows, ids.flip(1), weights, recv.handle, out=torch.empty_like(xs)
            ),
        )
        refused_combine(
            "out is", lambda recv: buf.decode_combine(recv.x, ids, weights, recv.handle, out=xs[:1])
        )
        refused_combine(
            "wire is 'int4'", lambda recv: buf.decode_combine(recv.x, ids, weights, recv.handle, wire="int4")
        )

        old, _ = buf.decode_dispatch(xs, ids, topk_weights=weights, quant=None, return_hook=False)
        refused("has sent the weights", lambda: buf.decode_combine(old.x, ids, weights, old.handle))
        old, _ = buf.decode_dispatch(xs, ids, topk_weights=weights, quant=None, return_hook=False)
        for _ in range(2):
            buf.decode_dispatch(xs, ids, quant=None, return_hook=False)
        refused("two later dispatches", lambda: buf.decode_combine(old.x, ids, None, old.handle))
        check_step(comm, buf, world)
        buf.close()
        refused("closed", lambda: buf.decode_dispatch(xs, ids, quant=None))

    moecomm.run_local(main, 2, timeout=20)


@pytest.mark.parametrize("per_node", [3, 1])
def test_ranks_that_disagree_learn_it_together(per_node):
    world = random_world(3, 4, 64, 12, 3, seed=3, masked=0)

    def main(comm):
        buf = make_buffer(comm, world)
        xs, ids, weights = (part[comm.rank] for part in world)
        for i in range(4):
            odd = comm.rank == i % 3
            with pytest.raises(moecomm.ConfigMismatch) as raised:
                buf.decode_dispatch(
                    xs,
                    ids,
                    topk_weights=weights if odd and i % 2 else None,
                    quant="fp8" if odd and not i % 2 else None,
                    return_hook=False,
                )
            assert (
                raised.value.peer == (i % 3 if not odd else raised.value.peer)
                and raised.value.rank == comm.rank
            )
            check_step(comm, buf, world)

    moecomm.run_local(main, 3, ranks_per_node=per_node, timeout=20)


# -- faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_node", [4, 2])
def test_a_rank_thread_leaves_between_send_and_receive(per_node):
    world = random_world(4, 4, 64, 16, 3, seed=4, masked=0)
    seen, received = {}, threading.Barrier(4)

    def main(comm):
        buf = make_buffer(comm, world)
        xs, ids, weights = (part[comm.rank] for part in world)
        check_step(comm, buf, world)
        recv, hook = buf.decode_dispatch(xs, ids, quant=None)
        if comm.rank != 1:
            hook()
        received.wait(60)  # a lost rank ends the calls of all others, those that wait for another rank too
        if comm.rank == 1:
            raise RuntimeError("leaves")
        started = time.monotonic()
        try:
            buf.decode_combine(recv.x, ids, weights, recv.handle)[1]()
        except moecomm.MoecommError as error:
            found = type(error), error.op, time.monotonic() - started
        else:
            found = None, None, 0
        with pytest.raises(moecomm.PeerLost):  # it stays broken
            buf.decode_dispatch(xs, ids, quant=None, return_hook=False)
        seen[comm.rank] = found  # written last: a failed rank is missing below

    with pytest.raises(RuntimeError, match="leaves"):
        moecomm.run_local(main, 4, ranks_per_node=per_node, timeout=20)
    assert sorted(seen) == [0, 2, 3]
    for kind, op, seconds in seen.values():
        assert kind is moecomm.PeerLost and op == "decode_combine" and seconds < 15  # with a timeout of 20


VICTIM = """
import os, signal, sys, time
import torch, moecomm
comm = moecomm.Communicator(ranks_per_node=3, timeout=20)
buf = moecomm.Buffer(comm, hidden=64, num_experts=6, top_k=6, max_tokens=4, decode=True)
x, ids = torch.ones(4, 64).bfloat16(), torch.arange(6).repeat(4, 1)
for step in range(5):
    recv, hook = buf.decode_dispatch(x, ids, quant=None)
    if comm.rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        hook()
        buf.decode_combine(recv.x, ids, torch.ones(4, 6), recv.handle)[1]()
    except moecomm.PeerLost as error:
        print("PeerLost", step, error.peer, error.rank, time.monotonic() - started < 5, flush=True)
        os._exit(7)
"""


def test_a_process_is_killed_between_send_and_receive(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ,
        PYTHONPATH=str(Path(__file__).parents[2]),
        WORLD_SIZE="3",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", VICTIM],
            env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    for r in (0, 2):
        assert ranks[r].returncode == 7 and said[r].split()[:1] + said[r].split()[2:] == [
            "PeerLost",
            "1",
            str(r),
            "True",
        ], said[r]
