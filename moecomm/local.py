"""run_local: ranks as threads of this process, the quickest way to try, test and debug."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import contextlib
import threading

from ._bootstrap import bootstrap

from ._cuda import cuda
from .communicator import Communicator, as_device, require_timeout
from .errors import InvalidArgument, MoecommError
from .shapes import as_int

R = TypeVar("R")
MOST_RANKS = 512  # rank threads that a command starts


def run_local(
    fn: Callable[[Communicator], R],
    size: int,
    *,
    ranks_per_node: int | None = None,
    device: Any = "cpu",
    timeout: float = 30.0,
) -> list[R]:
    """Run fn(comm) on `size` rank threads of this process and return the results by rank.

    Parameters
    ----------
    fn : callable
        Called with a Communicator of its own in every thread.
    size, ranks_per_node, device, timeout
        As for Communicator. "cuda" deals the ranks out over all GPUs; "cuda:0" lets them share one.

    Raises
    ------
    InvalidArgument
        An argument is wrong.
    Exception
        The first exception of a rank, with its rank in a note. The other ranks are released from
        their waits with PeerLost.
    """
    size = as_int(size)
    if not isinstance(size, int) or size < 1:
        raise InvalidArgument(f"size: got {size!r}; expected an int >= 1", op="run_local")
    if not callable(fn):
        raise InvalidArgument(f"fn: got {fn!r}; expected a function of a Communicator", op="run_local")
    require_timeout(timeout, "run_local")
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
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            with lock:
                errors.append((rank, error))
                if world.failed is None:
                    world.failed = rank
            world.barrier.abort()
            for other in comms:
                if other is not None and not other._closed:
                    other._abort(rank)
        finally:
            if not errors:
                try:
                    world.barrier.wait(timeout)  # nobody frees a window that another still reads
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
    except BaseException:  # Ctrl-C: the ranks wait for nobody any more
        world.barrier.abort()
        for rank, comm in enumerate(comms):
            if comm is not None and not comm._closed:
                comm._abort(rank)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    for comm in comms:
        if comm is not None:
            comm.close()
    if errors:
        # A rank that was released from its wait is not the cause: the first other error is.
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
