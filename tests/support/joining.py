"""The program of one rank process of test_bootstrap.py."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from survivors import describe
from torch import distributed as dist

import moecomm
from moecomm import mesh
from moecomm.balance import rebalance

TIMEOUT = 60.0  # much longer than the errors of a death take
BUFFER = dict(hidden=64, num_experts=12, top_k=2, max_tokens=8)


def group(folder, name, rank, size):
    """Make a gloo group with a timeout of half an hour."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=30),
    )
    return dist.group.WORLD


def attempt(call):
    """Return {error, seconds} of a call; error is None if it succeeds."""
    began = time.monotonic()
    try:
        call()
        error = None
    except moecomm.MoecommError as raised:
        error = describe(raised)
    return {"error": error, "seconds": time.monotonic() - began}


def tables(seed, size):
    """Return two placements, the second one made from the first."""

    def load(s):
        return torch.rand((1, 12), generator=torch.Generator().manual_seed(s)) + 0.1

    first = rebalance(load(seed), num_replicas=6 * size, num_ranks=size)
    return first, rebalance(load(seed + 1), num_replicas=6 * size, num_ranks=size, previous=first)


def migrate(comm):
    """Run one migration."""
    _, new = tables(1, comm.size)
    new.migrate([torch.zeros(6, 8)], comm).wait()


VERBS = {
    "Buffer": lambda comm: moecomm.Buffer(comm, **BUFFER),
    "duplicate": lambda comm: comm.duplicate(),
    "migrate": migrate,
    "barrier": lambda comm: [comm.barrier() for _ in range(3)],
    "shrink": lambda comm: comm.shrink(range(comm.size)),
}


def die_in_exchange(number):
    """Make this process kill itself in its exchange with this number; 0: while it connects."""
    seen, real = [], mesh.Mesh._allgather
    if number == 0:
        mesh.Mesh._answer = lambda self, callers: os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, data):
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, data)

    mesh.Mesh._allgather = counted


def killed(folder, rank, size, verb, victim, number):
    """Kill the victim inside the verb."""
    folder = Path(folder)
    if verb != "Communicator":
        comm = moecomm.Communicator(group(folder, "store", rank, size), ranks_per_node=1, timeout=TIMEOUT)
        comm.barrier()
    else:
        world = group(folder, "store", rank, size)
    if rank == victim:
        die_in_exchange(number)
    seen = attempt(
        (lambda: VERBS[verb](comm))
        if verb != "Communicator"
        else lambda: moecomm.Communicator(world, ranks_per_node=1, timeout=TIMEOUT)
    )
    if verb != "Communicator":
        left = comm.shrink(
            [r for r in range(size) if r != victim]
        )  # the survivors use neither the dead rank nor the torch group
        left.barrier()
        seen["left"] = [left.rank, left.size]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)  # gloo may wait for the victim


def late(folder, rank, size):
    """Let rank 1 arrive late at every call."""
    folder, seen = Path(folder), {}
    world = group(folder, "store", rank, size)
    comms = {verb: moecomm.Communicator(world, ranks_per_node=1, timeout=TIMEOUT) for verb in VERBS}
    for comm in comms.values():
        comm.barrier()
    for comm in comms.values():
        comm.bootstrap._timeout = 0.75  # set only here: a loaded machine may need longer for the calls before
    calls = {
        "Communicator": lambda: moecomm.Communicator(world, ranks_per_node=1, timeout=0.75),
        **{v: (lambda v=v: VERBS[v](comms[v])) for v in VERBS},
    }
    for verb, call in calls.items():
        if rank == 1:
            deadline = time.monotonic() + 60
            while not (folder / verb).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        seen[verb] = attempt(call)
        (folder / verb).touch()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def interrupted(folder, rank, size):
    """Send Ctrl-C to rank 0, which waits for rank 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, seen = Path(folder), {}
    comm = moecomm.Communicator(group(folder, "store", rank, size), ranks_per_node=1, timeout=TIMEOUT)
    began = time.monotonic()
    if rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            comm.barrier()
        except KeyboardInterrupt:
            seen = {"seconds": time.monotonic() - began}
        (folder / "out").touch()
    else:
        while not (folder / "out").exists() and time.monotonic() < began + 60:
            time.sleep(0.02)
        seen = attempt(comm.barrier)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def parts(folder, rank, size):
    """Use ranks in different numbers of torch groups, many duplicates, and splits on which ranks disagree."""
    folder, seen = Path(folder), {}
    world = group(folder, "store", rank, size)
    dist.new_group([0, 1])  # ranks 0 and 1 are in one more group than the others
    comm = moecomm.Communicator(world, ranks_per_node=2, timeout=TIMEOUT)
    dist.destroy_process_group()  # not needed any more

    def held():
        return [len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))]

    def once():
        with comm.duplicate() as other:
            other.barrier()

    once()
    comm.barrier()
    before = held()
    for _ in range(50):
        once()
    comm.barrier()
    seen["held"] = before, held()
    if rank < 3:
        with comm.shrink([2, 0, 1]) as left:
            seen["left"] = [left.rank, left.size]
            left.barrier()
    comm.barrier()
    seen["other list"] = attempt(
        lambda: comm.shrink([0, 1, 2, 3] if rank == 1 else [0, 1, 3] if rank != 2 else range(4))
    )
    comm.barrier()
    seen["bad list"] = attempt(lambda: comm.shrink([0, 1, "x"] if rank == 1 else range(4)))
    comm.barrier()
    seen["other call"] = attempt(comm.barrier if rank else lambda: moecomm.Buffer(comm, **BUFFER))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    comm.close()


def found(folder, rank, size, environment, initialized):
    """Make a Communicator() from the environment; write its rank and size, or the error."""
    folder, seen = Path(folder), {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update({k: v.format(rank=rank) for k, v in environment.items()})
    if initialized:
        group(folder, "store", rank, size)

    def join():
        with moecomm.Communicator(timeout=30.0) as comm:
            seen["world"] = [comm.rank, comm.size]
            comm.barrier()
        with moecomm.Communicator(timeout=30.0) as comm:  # the second time
            comm.barrier()

    seen |= attempt(join)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def with_timeout(folder, rank, size, texts):
    """Make a Communicator() with a MOECOMM_TIMEOUT that differs between ranks; write the error."""
    os.environ["MOECOMM_TIMEOUT"] = texts[rank]
    world = group(folder, "store", rank, size)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(attempt(lambda: moecomm.Communicator(world))))
    os._exit(0)


def apart(folder, rank):
    """Run one of two ranks in separate PID namespaces, then let both believe that they share one."""
    folder, rank, seen = Path(folder), int(rank), {}
    world = group(folder, "store", rank, 2)

    def step():
        comm = moecomm.Communicator(world, timeout=TIMEOUT)
        seen.setdefault("nodes", [comm.num_nodes, comm.ranks_per_node])
        buf = moecomm.Buffer(comm, hidden=64, num_experts=2, top_k=2, max_tokens=8)
        out = buf.dispatch(torch.full((1, 64), float(rank)).bfloat16(), torch.tensor([[0, 1]]))
        seen["rows"] = out.x[:, 0].tolist()
        comm.barrier()

    seen["as it is"] = attempt(step)["error"]
    moecomm.communicator._host_identity = lambda: "one host"
    seen["mistaken"] = attempt(step)["error"]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


def run(processes, folder, size, main, *arguments, without=None):
    """Start the ranks; return the output of each."""
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
