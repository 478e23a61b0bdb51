"""Small cuda worlds for the checker of tools/ptx: all roles of all kernels.

Each rank has two blocks, and rows are longer than a stage.
"""

import contextlib
import ctypes

import emulated_gpu
import pytest
import torch
from decode_steps import check_step
from decode_steps import make_buffer as decode_buffer
from worlds import assert_received, assert_same, random_world, round_trip

import moecomm
from moecomm import reference, tuning

HIDDEN = 512


def spread(hardware, traffic):
    """Choose plans for the checker.

    Two blocks, so that block scope and GPU scope differ; two warps, so that squads have barriers; short stages, so
    that a row needs several.
    """
    return tuning.replace(
        tuning.choose_plan(hardware, traffic, 2),
        num_sms=2,
        warps=2,
        channels=2,
        stage_bytes=128,
        senders=min(1, traffic.nodes - 1),
    )


def dispatch_and_combine(nodes, per_node, **how):
    """Run two round trips, each in a separate buffer."""

    def main(comm):
        for seed in (1, 2):
            world = random_world(
                comm.size, [3 + r for r in range(comm.size)], HIDDEN, 2 * comm.size, 2, seed=seed
            )
            round_trip(comm, world, num_experts=2 * comm.size, top_k=2, max_tokens=8, **how)

    return main, nodes, per_node


def places_used_again(nodes, per_node):
    """Two dispatches in one buffer, each of which is combined twice, with rows that the host stages: every place is
    written again while nothing but the calls themselves orders it behind its readers."""

    def main(comm):
        r, experts = comm.rank, 2 * comm.size
        worlds = [random_world(comm.size, 6, HIDDEN, experts, 2, seed=seed) for seed in (1, 2)]
        with contextlib.closing(
            moecomm.Buffer(comm, hidden=HIDDEN, num_experts=experts, top_k=2, max_tokens=6)
        ) as buf:
            for xs, ids, weights in worlds:
                want = reference.dispatch(xs, ids, weights, num_experts=experts)
                out = buf.dispatch(xs[r], ids[r], weights[r])
                assert_received(out, want[r], r)
                for factor in (0.5, 2.0):
                    expected = reference.combine(
                        [w.x * factor for w in want],
                        want,
                        [6] * comm.size,
                        ranks_per_node=comm.ranks_per_node,
                    )
                    assert_same(buf.combine(out.x * factor, out.handle), expected[r], f"rank {r}: y")

    return main, nodes, per_node


def decode(nodes, per_node, tokens, max_tokens=4, **how):
    def main(comm):
        first = random_world(comm.size, tokens, HIDDEN, 4 * comm.size, 2, seed=1)
        with contextlib.closing(decode_buffer(comm, first, decode=True, max_tokens=max_tokens)) as buf:
            for seed in (1, 2, 3):
                check_step(
                    comm, buf, random_world(comm.size, tokens, HIDDEN, 4 * comm.size, 2, seed=seed), **how
                )

    return main, nodes, per_node


WORLDS = {
    "one node": lambda: dispatch_and_combine(1, 2),
    "two nodes": lambda: dispatch_and_combine(2, 1),
    "two by two, ranks": lambda: dispatch_and_combine(2, 2, layout="rank"),
    "one node, again": lambda: places_used_again(1, 2),
    "two nodes, again": lambda: places_used_again(2, 1),
    "decode, squads": lambda: decode(1, 2, 1),
    "decode, warps": lambda: decode(1, 2, 4, scheme="fp8"),
    "decode, nodes": lambda: decode(2, 1, 3, weights_travel=True),
    "decode, slices": lambda: decode(2, 1, 10, max_tokens=12, weights_travel=True),
}


def run(name, seed, gpu, timeout=20.0):
    """Run one world under the checker; return the error or None."""
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
    """Install the emulated GPU with PTX kernels, outside of a test."""
    assert emulated_gpu.PTX, "needs EMULATED_KERNELS=ptx"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield emulated_gpu.install(patch, spread)
