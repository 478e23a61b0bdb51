"""The program of one rank of test_inside_calls.py: signal handlers, other threads and finalizers run during a call."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from survivors import describe, join

import moecomm

SHAPE = dict(hidden=64, num_experts=8, top_k=2, max_tokens=8)
LATE = 0.3  # seconds for which rank 0 waits in every call


def inputs(rank):
    """Return x and ids, equal on all ranks."""
    g = torch.Generator().manual_seed(rank)
    return torch.randn(8, 64, generator=g).bfloat16(), torch.rand(8, 8, generator=g).argsort(1)[
        :, :2
    ].contiguous()


class World:
    """Communicator, buffer and verbs of this rank. `interrupt` runs during every call of rank 0."""

    def __init__(self, folder, rank, per_node):
        self.rank = rank
        self.comm = moecomm.Communicator(join(folder, "first", rank, 2), ranks_per_node=per_node, timeout=8.0)
        self.buf = moecomm.Buffer(self.comm, **SHAPE, decode=True)
        self.x, self.ids = inputs(rank)
        self.out = self.buf.dispatch(self.x, self.ids)
        self.rows = self.out.x.clone()
        self.y = self.buf.combine(self.rows, self.out.handle)
        self.handle = None

    def dispatch(self):
        assert torch.equal(self.buf.dispatch(self.x, self.ids).x, self.rows)

    def combine(self):
        assert torch.equal(self.buf.combine(self.rows, self.out.handle), self.y)

    def decode_dispatch(self):
        recv, _ = self.buf.decode_dispatch(self.x, self.ids, quant=None, return_hook=False)
        self.handle = recv.handle
        self.handle.rows.copy_(recv.x)

    def decode_hook(self):
        recv, hook = self.buf.decode_dispatch(self.x, self.ids, quant=None)
        hook()
        self.handle = recv.handle
        self.handle.rows.copy_(recv.x)

    def decode_combine(self):
        y, _ = self.buf.decode_combine(self.handle.rows, self.ids, None, self.handle, return_hook=False)
        assert torch.equal(y.float(), (2 * self.x.float()).bfloat16().float())

    def asynchronous(self):
        assert torch.equal(self.buf.dispatch(self.x, self.ids, async_op=True).wait().x, self.rows)

    def meet(self, verb, interrupt=None, thread=False):
        """Call the verb; rank 1 calls it late.

        Meanwhile interrupt() runs on rank 0, in a signal handler or a thread.
        """
        self.comm.barrier()
        if self.rank == 1:
            time.sleep(LATE)
            self.called = time.monotonic()
            return getattr(self, verb)()
        worker = None
        if interrupt is not None and thread:
            worker = threading.Timer(LATE / 3, interrupt)
            worker.start()
        elif interrupt is not None:
            signal.signal(signal.SIGALRM, lambda *_: interrupt())
            signal.setitimer(signal.ITIMER_REAL, LATE / 3)
        getattr(self, verb)()
        if worker is not None:
            worker.join()
        return None


VERBS = ("dispatch", "combine", "decode_dispatch", "decode_combine", "decode_hook", "decode_combine")


def attempts(world, refused):
    """Try all calls of the library from here; collect the errors in `refused`."""
    buf = world.buf
    for what, call in {
        "dispatch": lambda: buf.dispatch(world.x, world.ids),
        "with weights": lambda: buf.dispatch(world.x, world.ids, torch.ones(8, 2)),
        "capacity": lambda: buf.dispatch(world.x, world.ids, capacity=32),
        "combine": lambda: buf.combine(world.rows, world.out.handle),
        "bias": lambda: buf.combine(world.rows, world.out.handle, bias=torch.zeros(64)),
        "stats": buf.stats,
        "decode_dispatch": lambda: buf.decode_dispatch(world.x, world.ids, quant=None),
        "async": lambda: buf.dispatch(world.x, world.ids, async_op=True).wait(),
    }.items():
        if what == "async" and refused:  # rank 1 does not make this call, so it would never complete
            continue
        try:
            call()
            refused.append([what, None])
        except BaseException as error:
            refused.append([what, describe(error)])


def every_verb(world):
    """Make calls from a signal handler during every verb."""
    refused = {}
    for n, verb in enumerate(VERBS):
        tried = refused[f"{n} {verb}"] = ["no async"]
        world.meet(verb, lambda tried=tried: attempts(world, tried))
    world.meet("dispatch")
    return refused


def pending(world):
    """A handler waits for an asynchronous call that cannot begin before the running call has ended."""
    seen = {}

    def interrupt():
        seen["pending"] = world.buf.dispatch(world.x, world.ids, async_op=True)
        try:
            seen["pending"].wait()
        except moecomm.MoecommError as error:
            seen["error"] = describe(error)

    world.meet("decode_hook", interrupt)
    call = seen.pop("pending", None) or world.buf.dispatch(world.x, world.ids, async_op=True)
    assert torch.equal(call.wait().x, world.rows)
    return seen


def windows():
    """Number of windows mapped in this process."""
    return sum("memfd:moecomm" in line for line in open("/proc/self/maps"))


def close(world, verb, thread, everything):
    """Close the buffer (and the communicator) during a call.

    That call returns its result, and the next call is refused.
    """
    seen = {"before": windows()}

    def interrupt():
        world.buf.close()
        if everything:
            world.comm.close()
        seen["closed"] = time.monotonic()

    world.meet(verb, interrupt if world.rank == 0 else None, thread)
    if world.rank == 1:
        seen["called"] = world.called
        world.buf.close()
    for name in ("dispatch", "asynchronous"):
        try:
            getattr(world, name)()
        except moecomm.MoecommError as error:
            seen[name] = describe(error)
    seen["rows"] = bool(torch.equal(world.out.x, world.rows))  # views stay valid
    world.out = world.handle = None
    gc.collect()
    seen["after"] = windows()
    return seen


def collect(world):
    """A signal handler drops the last reference to another buffer of the communicator."""
    other = moecomm.Buffer(world.comm, **SHAPE)
    other.dispatch(world.x, world.ids)
    box = {"other": other}
    other.cycle = box
    del other

    def interrupt():
        box.clear()
        gc.collect()

    before = windows()
    world.meet("dispatch", interrupt)
    box.clear()
    gc.collect()
    return {"before": before, "after": windows()}


def leave(world):
    """A handler closes everything and ends the process, like a SIGTERM handler."""
    seen = {}

    def interrupt():
        world.buf.close()
        world.comm.close()
        raise SystemExit(7)

    try:
        world.meet("dispatch", interrupt if world.rank == 0 else None)
    except SystemExit as error:
        seen["exit"] = error.code
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
    seen["closed"] = bool(world.comm.order.closed)
    return seen


def hook(world):
    """A hook closes the buffer before the call: the call is refused on this rank."""
    seen = {}
    world.buf.register_hook("pre_dispatch", lambda _: world.buf.close())
    try:
        world.dispatch()
    except moecomm.MoecommError as error:
        seen["error"] = describe(error)
    return seen


def main(folder, rank, per_node, environment, scenario, *arguments):
    """Run one scenario on one rank. Writes FOLDER/RANK.json."""
    os.environ.update(environment)
    folder = Path(folder)
    world = World(folder, rank, per_node)
    seen = globals()[scenario](world, *arguments)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
