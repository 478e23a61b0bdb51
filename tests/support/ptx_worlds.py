"""Small worlds of the cuda world for tools/ptx's checker: every role of every kernel, two blocks a rank,
rows longer than a stage.
"""

import contextlib
import ctypes

import emulated_gpu
import pytest
import torch
from decode_steps import check_step
from decode_steps import make_buffer as decode_buffer
from worlds import random_world, round_trip

import moecomm
from moecomm import tuning

HIDDEN = 512


def spread(hardware, traffic):
    """Two blocks, so that the scope of a block is not that of a GPU; two warps, so that squads have
    barriers; short stages, so that a row fills them several times."""
    return tuning.replace(
        tuning.choose_plan(hardware, traffic, 2),
        num_sms=2,
        warps=2,
        channels=2,
        stage_bytes=128,
        senders=min(1, traffic.nodes - 1),
    )


def dispatch_and_combine(nodes, per_node, **how):
    """Twice in one buffer, so that places are used again."""

    def main(comm):
        for seed in (1, 2):
            world = random_world(
                comm.size, [3 + r for r in range(comm.size)], HIDDEN, 2 * comm.size, 2, seed=seed
            )
            round_trip(comm, world, num_experts=2 * comm.size, top_k=2, max_tokens=8, **how)

    return main, nodes, per_node


def decode(nodes, per_node, tokens, **how):
    def main(comm):
        first = random_world(comm.size, tokens, HIDDEN, 4 * comm.size, 2, seed=1)
        with contextlib.closing(decode_buffer(comm, first, decode=True, max_tokens=4)) as buf:
            for seed in (1, 2, 3):
                check_step(
                    comm, buf, random_world(comm.size, tokens, HIDDEN, 4 * comm.size, 2, seed=seed), **how
                )

    return main, nodes, per_node


WORLDS = {
    "one node": lambda: dispatch_and_combine(1, 2),
    "two nodes": lambda: dispatch_and_combine(2, 1),
    "two by two, ranks": lambda: dispatch_and_combine(2, 2, layout="rank"),
    "decode, squads": lambda: decode(1, 2, 1),
    "decode, warps": lambda: decode(1, 2, 4, scheme="fp8"),
    "decode, nodes": lambda: decode(2, 1, 3, weights_travel=True),
}


def run(name, seed, gpu, timeout=20.0):
    """What one world finds under the checker, or None."""
    main, nodes, per_node = WORLDS[name]()
    gpu.calls.ptx_settings(ctypes.c_uint64(seed), 132)
    gpu.calls.ptx_check(True)
    try:
        moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, device="cuda:0", timeout=timeout)
        return None
    except Exception as e:
        return str(e) or type(e).__name__
    finally:
        gpu.calls.ptx_check(False)


@contextlib.contextmanager
def installed():
    """The emulated GPU with PTX kernels, in place outside of a test."""
    assert emulated_gpu.PTX, "needs EMULATED_KERNELS=ptx"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield emulated_gpu.install(patch, spread)
