"""Starts the ranks of both units on this host, and stops them."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import socket
import tempfile

from .rank import main
from .router import Router
from .units import Joining, Unit


def free_ports(count):
    """Return unused ports of this host."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@contextlib.asynccontextmanager
async def serving(config):
    """Context with a Router whose units are ready. At its end all processes have ended.

    Parameters
    ----------
    config : ServeConfig

    Yields
    ------
    Router

    Raises
    ------
    MoecommError
        A rank could not start.
    """
    folder = tempfile.mkdtemp(prefix="moecomm-serve-")
    units = {
        name: Unit(name, getattr(config, name).ranks, 2 * config.timeout) for name in ("prefill", "decode")
    }
    joining, router = Joining(folder, units.values()), Router(config, units["prefill"], units["decode"])
    try:
        await joining.open()
        _start(config, folder, units)
        for unit in units.values():
            await unit.ready()
        router.start()
        yield router
    finally:
        await router.close()
        for unit in units.values():
            await unit.stop()
        await joining.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(config, folder, units):
    # The forkserver imports torch once. The ranks are forked from it, before it has other threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.rank"])
    ports = dict(zip(("prefill", "decode", "link"), free_ports(3), strict=True))
    for unit in units.values():
        for rank in range(unit.size):
            process = context.Process(
                target=main,
                args=(folder, config.to_json(), unit.name, rank, ports),
                name=f"{unit.name} {rank}",
                daemon=True,
            )
            process.start()
            unit.processes[rank] = process
