"""The arena's promise: what arena_hint says is there, in whatever order pieces of whatever size come and go."""

import gc
import random

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture

import moecomm

SHAPE = dict(
    hidden=512, num_experts=4, top_k=2, max_tokens=64
)  # the worst case is far larger than what a piece has on top


def worst(rank, tokens):
    """Tokens all of whose picks go to rank 0."""
    return torch.full((tokens, 512), float(rank + 1)).bfloat16(), torch.tensor([0, 1]).repeat(tokens, 1)


def parts(out, which):
    """What somebody keeps of a dispatch: a piece stays as long as any part of it."""
    return {"all": out, "rows": out.x, "handle": out.handle, "output": out.handle.rows}[which]


@pytest.mark.parametrize("dispatches", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_any_order_keeps_the_promise(either_world, size, dispatches):  # noqa: F811
    """Fewer than `dispatches` are held: then the next one fits, whatever its size."""

    def main(comm):
        buf = moecomm.Buffer(
            comm, **SHAPE, arena_bytes=moecomm.Buffer.arena_hint(comm, **SHAPE, dispatches=dispatches)
        )
        for seed in range(12):
            r, held = random.Random(seed), []  # the same on every rank
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
            assert buf._native.arena()[:2] == (0, 0)
        comm.barrier()

    moecomm.run_local(main, size)


def test_loop_holds_two():
    """out = buf.dispatch(...) in a loop: the earlier result lives until the later one is there."""
    buf = moecomm.Buffer(moecomm.Communicator(), **{**SHAPE, "max_tokens": 128})
    for tokens in (100, 128, 128, 1, 128, 64, 128, 127, 128):
        out = buf.dispatch(*worst(0, tokens))
        assert len(out.x) == 2 * tokens


def test_small_ones_share_and_large_ones_span():
    """Beyond the promise: many small dispatches beside each other, and one that is larger than the worst
    case of tokens.
    """
    buf = moecomm.Buffer(moecomm.Communicator(), **SHAPE)
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
