"""run_local: runs ranks as threads of this process, to try, test and debug."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import contextlib
import threading

from ._bootstrap import bootstrap

from ._cuda import cuda
from .communicator import Communicator, as_device
from .deadlines import seconds_of
from .errors import InvalidArgument, MoecommError
from .shapes import as_int

R = TypeVar("R")
MOST_RANKS = 512  # limit of the rank threads that a command starts


def _abort(comm: Communicator, rank: int) -> None:
    """End the waits for peers on this host, because this rank has failed. Callable from any thread."""
    comm.native.abort(rank)
    if comm.cuda is not None:
        comm.cuda.peer_access.abort()


def run_local(
    fn: Callable[[Communicator], R],
    size: int,
    *,
    ranks_per_node: int | None = None,
    device: Any = "cpu",
    timeout: float | None = None,
) -> list[R]:
    """Run fn(comm) on `size` rank threads of this process and return the results by rank.

    Parameters
    ----------
    fn : callable
        Called in each thread with the Communicator of that rank.
    size : int
        Number of ranks.
    ranks_per_node, device, timeout
        As for Communicator. "cuda" distributes the ranks over all GPUs; "cuda:0" lets them share one.

    Returns
    -------
    list
        Results of fn by rank.

    Raises
    ------
    InvalidArgument
        An argument is wrong.
    Exception
        The first exception of a rank, with its rank in a note. The waits of the other ranks end with PeerLost.
    """
    size = as_int(size)
    if not isinstance(size, int) or size < 1:
        raise InvalidArgument(f"run_local: size is {size!r}; expected an int >= 1", op="run_local")
    if not callable(fn):
        raise InvalidArgument(
            f"run_local: fn is {fn!r}; expected a function of a Communicator", op="run_local"
        )
    timeout = seconds_of(timeout, "run_local")
    on_gpu = as_device(device, "run_local").type == "cuda"
    if on_gpu:
        cuda.prepare_threads()
    world = bootstrap.ThreadWorld(size, timeout)
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []
    lock = threading.Lock()
    comms: list[Communicator | None] = [None] * size

    def rank_main(rank: int) -> None:
        comm = None
        try:
            where = cuda.spread_over_gpus(device, rank) if on_gpu else device
            comm = Communicator(
                bootstrap.Thread(world, rank), ranks_per_node=ranks_per_node, device=where, timeout=timeout
            )
            comms[rank] = comm
            with cuda.own_stream(comm.device) if on_gpu else contextlib.nullcontext():
                results[rank] = fn(comm)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            with lock:
                errors.append((rank, error))
                if world.failed is None:
                    world.failed = rank
            world.barrier.abort()
            for other in comms:
                if other is not None and not other.order.closed:
                    _abort(other, rank)
        finally:
            with world.changed:
                world.ended.add(rank)
                world.changed.notify_all()
            if not errors:
                try:
                    world.barrier.wait(timeout)  # no rank frees a window that a peer still reads
                except threading.BrokenBarrierError:
                    pass

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"moecomm-rank-{rank}") for rank in range(size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C: end the waits of all ranks
        world.barrier.abort()
        for rank, comm in enumerate(comms):
            if comm is not None and not comm.order.closed:
                _abort(comm, rank)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    for comm in comms:
        if comm is not None:
            comm.close()
    if errors:
        # PeerLost of a rank whose wait was ended is not the cause. Prefer any other error.
        rank, error = next(
            (
                (r, e)
                for r, e in errors
                if not (isinstance(e, MoecommError) and e.op != None and type(e).__name__ == "PeerLost")
            ),
            errors[0],
        )
        error.add_note(f"raised on rank {rank} of run_local({size} ranks)") if hasattr(
            error, "add_note"
        ) else None
        raise error
    return results
