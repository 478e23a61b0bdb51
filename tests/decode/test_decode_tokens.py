"""decode_max_tokens: a separate size for the decode path's memory, in every world."""

import pytest
from decode_steps import check_step
from emulated_gpu import either_world  # noqa: F401 - a fixture
from worlds import random_world

import moecomm

HIDDEN, FEW, MANY = 128, 3, 48
pytestmark = pytest.mark.usefixtures("either_world")


def make(comm, **more):
    """Make a buffer for many tokens, of which decode uses few."""
    options = dict(
        hidden=HIDDEN,
        num_experts=2 * comm.size,
        top_k=2,
        max_tokens=MANY,
        num_sms=2,
        decode=True,
        decode_max_tokens=FEW,
    )
    return moecomm.Buffer(comm, **{**options, **more})


def test_decode_takes_fewer_tokens_than_dispatch():
    few, many = (random_world(2, tokens, HIDDEN, 4, 2, seed=tokens) for tokens in (FEW, MANY))

    def main(comm):
        buf = make(comm)
        assert buf.decode_max_tokens == FEW
        for i in range(3):
            check_step(comm, buf, few, scheme="fp8" if i == 1 else None)
        x, ids, _ = (t[comm.rank] for t in many)
        assert buf.decode_dispatch(x[:FEW], ids[:FEW], return_hook=False)[0].x.shape == (2, 2 * FEW, HIDDEN)
        with pytest.raises(
            moecomm.InvalidArgument,
            match=f"x has {FEW + 1} tokens; expected at most decode_max_tokens = {FEW}",
        ):
            buf.decode_dispatch(x[: FEW + 1], ids[: FEW + 1])
        assert buf.dispatch(x, ids).handle.num_tokens == MANY
        comm.barrier()

    moecomm.run_local(main, 2, timeout=20)


def test_it_sets_the_memory():
    def main(comm):
        shape = dict(hidden=HIDDEN, num_experts=2 * comm.size, top_k=2, max_tokens=MANY)
        sizes = [
            moecomm.Buffer.size_hint(comm, **shape, decode=d, decode_max_tokens=n)
            for d, n in ((False, None), (True, FEW), (True, MANY), (True, None))
        ]
        assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
        assert make(comm, channels=1).num_bytes == moecomm.Buffer.size_hint(
            comm, **shape, channels=1, decode=True, decode_max_tokens=FEW
        )
        assert make(comm, decode_max_tokens=None).decode_max_tokens == MANY

    moecomm.run_local(main, 1)


@pytest.mark.parametrize("wrong", [0, MANY + 1, -1, 2.5, "all"])
def test_what_it_may_be(wrong):
    def main(comm):
        for call in (
            lambda: make(comm, decode_max_tokens=wrong),
            lambda: moecomm.Buffer.size_hint(
                comm,
                hidden=HIDDEN,
                num_experts=2,
                top_k=1,
                max_tokens=MANY,
                decode=True,
                decode_max_tokens=wrong,
            ),
        ):
            with pytest.raises(
                moecomm.InvalidArgument,
                match=f"decode_max_tokens is {wrong!r}; expected 1..max_tokens = {MANY}",
            ):
                call()

    moecomm.run_local(main, 1)


def test_ranks_must_agree_about_it():
    def main(comm):
        with pytest.raises(moecomm.ConfigMismatch, match="decode_max_tokens"):
            make(comm, decode_max_tokens=2 + comm.rank)

    moecomm.run_local(main, 2, timeout=20)
