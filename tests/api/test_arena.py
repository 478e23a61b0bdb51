"""The guarantee of arena_hint: pieces of any size fit, in any order of taking and freeing them."""

import gc
import random

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

SHAPE = dict(
    hidden=512, num_experts=4, top_k=2, max_tokens=64
)  # the worst case is far larger than the overhead of a piece


def worst(rank, tokens):
    """Return tokens whose picks all go to rank 0."""
    return torch.full((tokens, 512), float(rank + 1)).bfloat16(), torch.tensor([0, 1]).repeat(tokens, 1)


def parts(out, which):
    """Return what a program may keep of a dispatch: a piece stays as long as any part of it."""
    return {"all": out, "rows": out.x, "handle": out.handle, "output": out.handle.rows}[which]


@pytest.mark.parametrize("dispatches", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_any_order_keeps_the_promise(either_world, size, dispatches):  # noqa: F811
    """While fewer than `dispatches` pieces are held, the next one of any size fits."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, **SHAPE, arena_bytes=moecomm.Buffer.arena_hint(comm, **SHAPE, dispatches=dispatches)
        )
        for seed in range(12):
            r, held = random.Random(seed), []  # equal on all ranks
            for _ in range(12):
                while len(held) >= dispatches or (held and r.random() < 0.3):
                    del held[r.randrange(len(held))]
                tokens = r.choice([0, 1, 7, 32, 63, 64, 64, 64])
                which, how = (
                    r.choice(["all", "rows", "handle", "output"]),
                    r.choice([{}, {"layout": "rank"}, {"quant": "fp8"}]),
                )
                out = buf.dispatch(*worst(comm.rank, tokens), **how)
                rows = out.handle.rows.fill_(1.0)
                y = buf.combine(rows, out.handle)
                assert (y == (1 if how.get("layout") else 2)).all() and len(y) == tokens
                held.append(parts(out, which))
                del out, rows
            held.clear()
            gc.collect()
            assert buf.backend.memory.native.arena()[:2] == (0, 0)
        comm.barrier()

    moecomm.run_local(main, size)


def test_loop_holds_two():
    """out = buf.dispatch(...) in a loop: the earlier result lives until the next one exists."""
    buf = moecomm.Buffer(moecomm.Communicator(), **{**SHAPE, "max_tokens": 128})
    for tokens in (100, 128, 128, 1, 128, 64, 128, 127, 128):
        out = buf.dispatch(*worst(0, tokens))
        assert len(out.x) == 2 * tokens


def test_small_ones_share_and_large_ones_span():
    """Small pieces share the space of one, and a large one uses the space of several.

    Also beyond the guarantee: an arena of fixed size does not grow.
    """
    comm = moecomm.Communicator()
    buf = moecomm.Buffer(comm, **SHAPE, arena_bytes=moecomm.Buffer.arena_hint(comm, **SHAPE))
    held = [buf.dispatch(*worst(0, 3)) for _ in range(24)]
    assert len({out.x.data_ptr() for out in held}) == 24
    with pytest.raises(moecomm.CapacityExceeded):
        held += [buf.dispatch(*worst(0, 64)) for _ in range(3)]
    held.clear()
    gc.collect()
    out = buf.dispatch(*worst(0, 64), capacity=200)  # 128 rows are the worst case
    assert out.x.shape == (200, 512)
    del out
    gc.collect()
    pair = [buf.dispatch(*worst(0, 64)) for _ in range(2)]
    assert len(pair) == 2
