"""Ranks that are processes of their own: started, waited for, and never left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import time


@contextlib.contextmanager
def started(processes, jobs):
    """Processes of [(function, arguments)]; none of them outlives the block."""
    ranks = [processes.Process(target=function, args=arguments) for function, arguments in jobs]
    for p in ranks:
        p.start()
    try:
        yield ranks
    finally:
        for p in ranks:
            p.kill()
            p.join()


def finish(ranks, victims=(), seconds=200):
    """Every process ends in time: the victims by SIGKILL, the others well."""
    end = time.monotonic() + seconds
    for r, p in enumerate(ranks):
        p.join(max(0.0, end - time.monotonic()))
        expected = -signal.SIGKILL if r in victims else 0
        assert p.exitcode == expected, f"process {r}: {p.exitcode} (None: it hangs)"


def run(processes, folder, target, size, arguments, victims=()):
    """What the survivors of target(folder, rank, *arguments) have written, by rank."""
    with started(processes, [(target, (str(folder), r, *arguments)) for r in range(size)]) as ranks:
        finish(ranks, victims)
    return {r: json.loads((folder / f"{r}.json").read_text()) for r in range(size) if r not in victims}
