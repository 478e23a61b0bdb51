"""What one rank of tests/elastic/test_join_deaths.py does: it dies, or stops, at a named point while ranks join."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from growing_worker import Serving
from lasting_worker import EXPERTS_PER_RANK, HIDDEN, TOKENS, TOP_K
from survivors import describe, join

import moecomm
from moecomm._bootstrap import joining, mesh, sockets
from moecomm.collective import Collective
from moecomm.communicator import Communicator
from moecomm.windows import Windows

SIZE, WAITS = 3, 600.0  # seconds: longer than any test
# Of the rank that joins, in this order; of a rank that serves, in this order.
NEW = (
    "let in",
    "connected",
    "joined",
    "window",
    "buffer",
    "telling admit",
    "told admit",
    "telling steps",
    "told steps",
    "active",
)
OLD = (
    "started",
    "inviting",
    "connected",
    "window",
    "told connect",
    "telling ready",
    "told ready",
    "changing",
    "telling steps",
    "told steps",
)


class Strike:
    """Kills or stops this process, and says so before."""

    def __init__(self, folder, action):
        self.file, self.action, self.told = folder / "struck", action, 0

    def __call__(self):
        self.file.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)

    def around(self, owner, name, *, before=False, when=lambda *args: True):
        """Strike before or after a call of owner.name."""
        real = getattr(owner, name)

        def call(*args, **how):
            hit = when(*args)
            if hit and before:
                self()
            result = real(*args, **how)
            if hit and not before:
                self()
            return result

        setattr(owner, name, call)

    def in_exchange(self, chosen, lines):
        """Strike in the exchange that chosen(op, value) names, when `lines` lines have been told; -1: all."""
        armed, exchange, tell = [], Collective.exchange, mesh.Mesh._tell

        def call(collective, value, op="exchange"):
            if chosen(op, value):
                armed.append(collective.bootstrap)
            return exchange(collective, value, op)

        def telling(self_, kind, number, origin, payload=b"", but=None):
            if kind != sockets.VALUE or self_ not in armed:
                return tell(self_, kind, number, origin, payload, but)
            armed.clear()
            for line in list(self_._lines.values())[: lines if lines >= 0 else None]:
                line.put(kind, number, origin, payload)
            return self()

        Collective.exchange, mesh.Mesh._tell = call, telling

    def arm(self, point):
        """Wait for a point of NEW or OLD."""
        if point == "let in":
            self.around(joining, "dial_in")
        elif point == "connected":
            self.around(joining.Wider, "connect")
        elif point == "joined":
            self.around(Communicator, "_join_world")
        elif point == "window":
            self.around(Windows, "__init__", before=True)
        elif point == "buffer":
            self.around(Windows, "__init__")
        elif point == "started":
            self.around(Communicator, "_start")
        elif point == "inviting":
            self.around(joining.Waiting, "invite", before=True)
        elif point == "changing":
            self.around(Communicator, "_change", before=True)
        elif point == "told connect":  # the others map its window, or have not begun to
            self.in_exchange(lambda op, value: op == "Buffer" and value == (None,) * 4, -1)
        elif point.endswith("admit"):
            self.in_exchange(lambda op, value: op == "barrier", 1 if "telling" in point else -1)
        elif point.endswith("steps"):
            how = 1 if "telling" in point else -1
            self.in_exchange(lambda op, value: op == "admit" and isinstance(value, int), how)
        elif point.endswith("ready"):
            how = 1 if "telling" in point else -1
            self.in_exchange(lambda op, value: op == "admit" and "ready" in str(value), how)
        else:
            assert point == "active"
            self.around(Communicator, "admit")


def main(folder, rank, per_node, timeout, victim, point, action, progress, last):
    """A rank that serves; the victim arms its end when others may join."""
    folder = Path(folder)
    comm = Communicator(join(folder, "first", rank, SIZE), ranks_per_node=per_node, timeout=timeout)
    experts = SIZE * EXPERTS_PER_RANK
    arguments = dict(hidden=HIDDEN, num_experts=experts, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32)
    serving = Serving(comm, moecomm.Buffer(comm, **arguments), experts)
    serving.step()
    if rank == victim:
        Strike(folder, action).arm(point)
    if rank == 1:
        (folder / "address.new").write_text(comm.address)
        os.rename(folder / "address.new", folder / "address")
    serve(folder, serving, str(rank), progress, 2 * rank, last)


def fresh(folder, number, after, point, action, progress, last):
    """A rank that joins, once the victim has struck if it is to come after that; again where others die."""
    folder, name = Path(folder), f"new{number}"
    while not (folder / "address").exists() or (after and not (folder / "struck").exists()):
        time.sleep(0.005)
    if point is not None:
        Strike(folder, action).arm(point)
    while True:
        comm = None
        try:
            comm = Communicator.join((folder / "address").read_text(), timeout=WAITS)
            buf = moecomm.Buffer(comm, **comm.offered[0])
            assert comm.admit() is True
            break
        except moecomm.MoecommError as error:
            if point is not None:  # it was stopped
                (folder / f"{name}.json").write_text(json.dumps(describe(error)))
                return
            if not isinstance(error, moecomm.PeerLost):
                raise
            if comm is not None:
                comm.close()
    serving = Serving(comm, buf, comm.offered[0]["num_experts"])
    serve(folder, serving, name, progress, 2 * (SIZE + number), last)


def serve(folder, serving, name, progress, slot, last):
    """Steps, every one compared, until the one that the parent names. progress[slot]: steps, and the size."""
    comm = serving.comm
    while not last.value or comm.steps < last.value:
        try:
            serving.step()
            comm.admit()
        except moecomm.Excluded as error:
            (folder / f"{name}.json").write_text(json.dumps(describe(error)))
            return
        progress[slot], progress[slot + 1] = comm.steps, comm.size
    (folder / f"{name}.json").write_text(json.dumps({"members": comm.members, "steps": comm.steps}))
    comm.close()
