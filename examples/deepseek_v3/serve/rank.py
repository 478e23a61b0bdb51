"""Main program of one rank: joins its unit, then answers the router until the router stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback

import torch

import moecomm

from .config import ServeConfig
from .decode import DecodeRank, cache_length
from .handover import HandOver
from .model import load_model
from .prefill import PrefillRank
from .units import RouterLine


def join(rank, size, port, **how):
    """Make a Communicator of the ranks that use this port of this host."""
    where = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    return moecomm.Communicator(**how)


def main(folder, values, unit, rank, ports):
    """Serve as one rank.

    Parameters
    ----------
    folder : str
        Folder with the router's socket.
    values : dict
        ServeConfig.to_json().
    unit : "prefill" or "decode"
    rank : int
        Rank in the unit.
    ports : dict
        Ports for the communicators "prefill", "decode" and "link" (both units).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router handles it and stops the ranks
    torch.set_num_threads(1)
    for name in [
        name for name in os.environ if name.startswith(("OMPI_", "PMI", "PRTE_", "TORCHELASTIC_", "SLURM_"))
    ]:
        del os.environ[name]  # variables of a launcher that has started the router, not this rank
    config = ServeConfig.from_json(values)
    line, joined = RouterLine(folder, unit, rank), False
    try:
        with contextlib.ExitStack() as stack, torch.inference_mode():
            served = _make(stack, config, unit, rank, ports)
            line.hello()
            joined = True
            while (message := line.receive())["do"] != "stop":
                line.send(served.handle(message))
    except (BrokenPipeError, ConnectionResetError):
        line.receive()  # the router has ended during a step: clean up
    except BaseException as error:  # report every error to the router
        line.send_error(error, joined)
        if not isinstance(error, moecomm.MoecommError):
            traceback.print_exc()  # a bug of this program
        raise SystemExit(1) from error


def _make(stack, config, unit, rank, ports):
    shape = getattr(config, unit)
    comm = stack.enter_context(
        join(rank, shape.ranks, ports[unit], ranks_per_node=shape.ranks_per_node, timeout=config.timeout)
    )
    first = config.decode.ranks if unit == "prefill" else 0
    all_ranks = config.decode.ranks + config.prefill.ranks
    # If the nodes of both units have the same size, they are the nodes of the link. Else each rank is a node.
    sizes = {config.decode.ranks_per_node, config.prefill.ranks_per_node}
    per_node = sizes.pop() if len(sizes) == 1 else 1
    link = stack.enter_context(
        join(first + rank, all_ranks, ports["link"], ranks_per_node=per_node, timeout=config.timeout)
    )
    c = config.model
    cache = (c.layers + c.mtp, config.slots, cache_length(config), c.cache_width)
    handover = HandOver(link, config.decode.ranks, cache, config.torch_dtype)
    stack.callback(handover.close)
    model = load_model(config)
    served = (PrefillRank if unit == "prefill" else DecodeRank)(config, comm, model, handover)
    stack.callback(served.experts.close)
    stack.callback(served.group.close)
    return served
