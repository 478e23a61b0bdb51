"""Invalid arguments: each message names the argument, the value and the expectation.

No data moves, and the buffer stays usable.
"""

import numpy as np
import pytest
import torch
from worlds import assert_same

import moecomm

T, H, K, E = 4, 64, 2, 8
NAN = float("nan")


def good(rank):
    """Return valid inputs."""
    g = torch.Generator().manual_seed(rank)
    return (
        torch.randn((T, H), generator=g).bfloat16(),
        torch.rand((T, E), generator=g).argsort(1)[:, :K].contiguous(),
        torch.rand((T, K), generator=g),
    )


def ids_with(value, at=(1, 1)):
    ids = good(0)[1].clone()
    ids[at] = value
    return ids


# name: (change of the valid (x, ids, weights) and of the options, pattern of the message)
DISPATCH = {
    "x dtype": (
        lambda x, i, w: ((x.float(), i, w), {}),
        r"x is torch.float32 \[4, 64\] on cpu; expected contiguous torch.bfloat16 \[T, 64\]",
    ),
    "x shape": (
        lambda x, i, w: ((x[:, :32].contiguous(), i, w), {}),
        r"x is torch.bfloat16 \[4, 32\].*expected.*\[T, 64\]",
    ),
    "x dimensions": (lambda x, i, w: ((x[0], i, w), {}), r"x is torch.bfloat16 \[64\].*expected.*\[T, 64\]"),
    "x stride": (
        lambda x, i, w: ((x.t().contiguous().t(), i, w), {}),
        r"x is non-contiguous torch.bfloat16.*expected contiguous",
    ),
    "x device": (
        lambda x, i, w: ((x.to("meta"), i, w), {}),
        r"x is torch.bfloat16 \[4, 64\] on meta; expected.*on cpu",
    ),
    "x layout": (
        lambda x, i, w: ((x.to_sparse(), i, w), {}),
        r"x is torch.sparse_coo; expected a dense tensor",
    ),
    "x negated": (lambda x, i, w: ((torch._neg_view(x), i, w), {}), r"x is a negated view.*resolve_neg"),
    "x missing": (
        lambda x, i, w: ((None, i, w), {}),
        r"x is a NoneType; expected a tensor or a DLPack array",
    ),
    "x alone in a tuple": (
        lambda x, i, w: (((x,), i, w), {}),
        r"x is a tuple of 1; expected a tensor, or \(fp8 rows, scales\)",
    ),
    "ids kind": (
        lambda x, i, w: ((x, i.tolist(), w), {}),
        r"topk_ids is a list; expected a tensor or a DLPack array",
    ),
    "x kind": (lambda x, i, w: (("rows", i, w), {}), r"x is a str; expected a tensor or a DLPack array"),
    "too many tokens": (
        lambda x, i, w: ((torch.cat([x] * 3), torch.cat([i] * 3), None), {}),
        r"x has 12 tokens; expected at most max_tokens = 8",
    ),
    "ids dtype": (
        lambda x, i, w: ((x, i.float(), w), {}),
        r"topk_ids is torch.float32.*expected.*torch.int64 or torch.int32 \[4, 2\]",
    ),
    "ids shape": (
        lambda x, i, w: ((x, i[:, :1].contiguous(), w), {}),
        r"topk_ids is torch.int64 \[4, 1\].*expected.*\[4, 2\]",
    ),
    "ids stride": (lambda x, i, w: ((x, i.t().contiguous().t(), w), {}), r"topk_ids is non-contiguous"),
    "ids missing": (lambda x, i, w: ((x, None, w), {}), r"topk_ids is None; expected"),
    "id too large": (
        lambda x, i, w: ((x, ids_with(E), w), {}),
        r"topk_ids: expert id 8 is out of range in token 1; expected distinct ids in \[0, num_experts\), or -1",
    ),
    "id below -1": (
        lambda x, i, w: ((x, ids_with(-2), w), {}),
        r"topk_ids: expert id -2 is out of range in token 1",
    ),
    "id twice": (
        lambda x, i, w: ((x, ids_with(int(good(0)[1][1, 0])), w), {}),
        r"topk_ids: expert id \d is picked twice in token 1",
    ),
    "weights dtype": (
        lambda x, i, w: ((x, i, w.double()), {}),
        r"topk_weights is torch.float64.*expected.*torch.float32 \[4, 2\]",
    ),
    "weights shape": (
        lambda x, i, w: ((x, i, w[:2].contiguous()), {}),
        r"topk_weights is torch.float32 \[2, 2\].*expected.*\[4, 2\]",
    ),
    "weights NaN": (
        lambda x, i, w: ((x, i, w * NAN), dict(check=True)),
        r"topk_weights has NaN; expected numbers",
    ),
    "layout": (
        lambda x, i, w: ((x, i, w), dict(layout="token")),
        r"layout is 'token'; expected 'expert' or 'rank'",
    ),
    "alignment": (
        lambda x, i, w: ((x, i, w), dict(expert_alignment=0)),
        r"expert_alignment is 0; expected an int in 1..65536",
    ),
    "alignment of ranks": (
        lambda x, i, w: ((x, i, w), dict(layout="rank", expert_alignment=4)),
        r"expert_alignment is 4; .*expected 1",
    ),
    "capacity": (lambda x, i, w: ((x, i, w), dict(capacity=-1)), r"capacity is -1; expected an int >= 0"),
    "capacity beyond counting": (
        lambda x, i, w: ((x, i, w), dict(capacity=1 << 63)),
        r"capacity is 9223372036854775808; expected an int >= 0, at most",
    ),
    "quant kind": (lambda x, i, w: ((x, i, w), dict(quant=["fp8"])), r"quant is \['fp8'\]; expected"),
    "quant": (lambda x, i, w: ((x, i, w), dict(quant="int3")), r"quant is 'int3'; expected"),
    "scales": (
        lambda x, i, w: (((x.to(torch.float8_e4m3fn), torch.ones(T, 2)), i, w), {}),
        r"scales is torch.float32 \[4, 2\].*expected.*\[4, 1\]",
    ),
    "handle kind": (
        lambda x, i, w: ((x, None, w), dict(handle=7)),
        r"handle is a int; expected the handle of a dispatch",
    ),
}
COMBINE = {
    "rows dtype": (
        lambda r, w: ((r.float(),), {}),
        r"rows is torch.float32.*expected contiguous torch.bfloat16",
    ),
    "rows shape": (
        lambda r, w: ((torch.cat([r, r[:1]]),), {}),
        r"rows is torch.bfloat16 \[\d+, 64\].*expected.*\[\d+, 64\]",
    ),
    "rows stride": (lambda r, w: ((r.t().contiguous().t(),), {}), r"rows is non-contiguous"),
    "weights shape": (
        lambda r, w: ((r,), dict(topk_weights=w[:-1].contiguous())),
        r"topk_weights is torch.float32 \[\d+\].*expected",
    ),
    "weights dtype": (
        lambda r, w: ((r,), dict(topk_weights=w.double())),
        r"topk_weights is torch.float64.*expected.*torch.float32",
    ),
    "weights NaN": (
        lambda r, w: ((r,), dict(topk_weights=w * NAN, check=True)),
        r"topk_weights has NaN; expected numbers",
    ),
    "bias shape": (
        lambda r, w: ((r,), dict(bias=torch.zeros(3))),
        r"bias is torch.float32 \[3\].*expected \[64\] or \[4, 64\]",
    ),
    "bias dtype": (lambda r, w: ((r,), dict(bias=torch.zeros(H, dtype=torch.int32))), r"bias is torch.int32"),
    "wire kind": (lambda r, w: ((r,), dict(wire=["fp8"])), r"wire is \['fp8'\]; expected"),
    "rows kind": (lambda r, w: ((None,), {}), r"rows is a NoneType; expected a tensor"),
    "out kind": (lambda r, w: ((r,), dict(out=[1])), r"out is a list; expected a tensor"),
    "wire": (lambda r, w: ((r,), dict(wire="zip")), r"wire is 'zip'; expected"),
    "out shape": (
        lambda r, w: ((r,), dict(out=torch.empty(1, H).bfloat16())),
        r"out is torch.bfloat16 \[1, 64\].*expected.*\[4, 64\]",
    ),
    "out in rows": (
        lambda r, w: (lambda more: ((more[: len(r)],), dict(out=more[len(r) - 1 : len(r) + T - 1])))(
            torch.cat([r, r.new_zeros(T, H)])
        ),
        r"out shares memory with rows; expected separate memory",
    ),
    "out in bias": (
        lambda r, w: (
            lambda b: ((r,), dict(bias=b, out=b.view(torch.bfloat16).view(-1)[: T * H].view(T, H)))
        )(torch.zeros(T, H)),
        r"out shares memory with bias",
    ),
    "out read-only": (
        lambda r, w: ((r,), dict(out=np.broadcast_to(np.zeros(H, dtype=np.float32), (T, H)))),
        r"out is a read-only array",
    ),
}


def refused(op, pattern, rank, call):
    """Assert that the call is refused with this message, and that the fields of the error are set."""
    with pytest.raises(moecomm.InvalidArgument, match=f"{op}.*{pattern}|{pattern}") as raised:
        call()
    assert isinstance(raised.value, ValueError) and raised.value.op == op and raised.value.rank == rank


@pytest.fixture(scope="module")
def refusals():
    """Try all of the above on one buffer of two ranks, with valid calls between; return {name: None or the fault}."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8)
        x, ids, weights = good(comm.rank)
        found = {}
        first = buf.dispatch(x, ids, weights)
        expected = (
            first.x.clone(),
            buf.combine(first.x.clone(), first.handle, topk_weights=first.topk_weights),
        )

        def attempt(name, op, pattern, call):
            buf.stats()
            try:
                refused(op, pattern, comm.rank, call)
                s = buf.stats()
                assert s["rail"]["logical_rows"] == s["node"]["logical_rows"] == s["staged_rows"] == 0, (
                    f"something moved: {s}"
                )
                out = buf.dispatch(x, ids, weights)  # usable, and correct
                assert_same(out.x, expected[0], "rows")
                assert_same(
                    buf.combine(out.x.clone(), out.handle, topk_weights=out.topk_weights), expected[1], "y"
                )
                found[op, name] = None
            except BaseException as error:
                found[op, name] = error

        for name, (change, pattern) in DISPATCH.items():
            arguments, options = change(x, ids, weights)
            attempt(name, "dispatch", pattern, lambda a=arguments, o=options: buf.dispatch(*a, **o))
        for name, (change, pattern) in COMBINE.items():
            arguments, options = change(first.x.clone(), first.topk_weights.clone())
            attempt(
                name, "combine", pattern, lambda a=arguments, o=options: buf.combine(*a, first.handle, **o)
            )
        attempt(
            "tokens of a handle",
            "dispatch",
            r"x has 3 tokens; expected 4, as in the plan",
            lambda: buf.dispatch(x[:3], None, weights[:3], handle=first.handle),
        )
        attempt(
            "ids and handle",
            "dispatch",
            r"topk_ids and handle are both given; expected one",
            lambda: buf.dispatch(x, ids, handle=first.handle),
        )
        attempt(
            "layout of a handle",
            "dispatch",
            r"layout, expert_alignment and capacity come from the handle",
            lambda: buf.dispatch(x, handle=first.handle, capacity=3),
        )
        other = moecomm.Buffer(comm, hidden=H, num_experts=2 * E, top_k=K, max_tokens=8)
        theirs = other.dispatch(x, ids, weights).handle
        attempt(
            "handle of another shape",
            "combine",
            r"handle belongs to a buffer of another communicator or shape",
            lambda: buf.combine(theirs.rows, theirs),
        )
        attempt(
            "handle of another shape",
            "dispatch",
            r"handle belongs to a buffer of another communicator or shape",
            lambda: buf.dispatch(x, handle=theirs),
        )
        by_rank = buf.dispatch(x, ids, weights, layout="rank")
        attempt(
            "weights of the rank layout",
            "combine",
            r"topk_weights is given; .*expected None",
            lambda: buf.combine(
                by_rank.x.clone(), by_rank.handle, topk_weights=torch.ones(by_rank.handle.num_rows)
            ),
        )
        return found

    return moecomm.run_local(main, 2, timeout=20)


NAMES = (
    [("dispatch", n) for n in DISPATCH]
    + [("combine", n) for n in COMBINE]
    + [
        ("dispatch", "tokens of a handle"),
        ("dispatch", "ids and handle"),
        ("dispatch", "layout of a handle"),
        ("combine", "handle of another shape"),
        ("dispatch", "handle of another shape"),
        ("combine", "weights of the rank layout"),
    ]
)


@pytest.mark.parametrize("op,name", NAMES)
def test_refused(refusals, op, name):
    for rank, found in enumerate(refusals):
        error = found[op, name]
        if error is not None:
            raise AssertionError(f"rank {rank}: {type(error).__name__}: {error}") from error


def test_one_rank_alone_may_be_wrong():
    """The other ranks continue once all ranks know of the refusal."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8)
        x, ids, weights = good(comm.rank)
        with pytest.raises(moecomm.InvalidArgument) as raised:
            buf.dispatch(x, ids_with(E) if comm.rank == 1 else ids, weights)
        assert raised.value.peer == (None if comm.rank == 1 else 1)
        out = buf.dispatch(x, ids, weights)
        comm.barrier()
        return int(out.tokens_per_expert.sum())

    assert sum(moecomm.run_local(main, 2)) == 2 * T * K


def test_nan_is_data():
    def main(comm):
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8)
        x, ids, weights = good(0)
        out = buf.dispatch(x * NAN, ids, weights * NAN)
        assert out.x.isnan().all() and out.topk_weights.isnan().all()
        assert buf.combine(out.x.clone(), out.handle).isnan().all()

    moecomm.run_local(main, 1)


def test_use_after_close():
    def main(comm):
        buf = moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8)
        x, ids, _ = good(0)
        out = buf.dispatch(x, ids)
        buf.close()
        for op, call in (
            ("dispatch", lambda: buf.dispatch(x, ids)),
            ("combine", lambda: buf.combine(out.x, out.handle)),
            ("stats", buf.stats),
        ):
            refused(op, "the buffer is closed", 0, call)
        comm.close()
        refused("barrier", "the communicator is closed", 0, comm.barrier)
        refused(
            "Buffer",
            "the communicator is closed",
            0,
            lambda: moecomm.Buffer(comm, hidden=H, num_experts=E, top_k=K, max_tokens=8),
        )

    main(moecomm.Communicator())


def test_what_has_no_business_there():
    """Objects that are never valid, in the fast path of a call and in the slow one."""
    comm = moecomm.Communicator()
    shape = dict(hidden=H, num_experts=E, top_k=K, max_tokens=8)
    refused(
        "Buffer",
        "comm is a NoneType; expected a Communicator",
        None,
        lambda: moecomm.Buffer(None, **shape),
    )
    refused(
        "size_hint",
        "size is None; expected a number of ranks, or a Communicator",
        None,
        lambda: moecomm.Buffer.size_hint(None, **shape),
    )
    for make in (moecomm.Buffer, moecomm.Buffer.size_hint):
        refused("Buffer", "dtype is \\[1\\]", 0, lambda make=make: make(comm, **shape, dtype=[1]))
    refused("shrink", "alive is \\['a'\\]; expected ranks", 0, lambda: comm.shrink("a"))
    buf = moecomm.Buffer(comm, **shape)
    x, ids, _ = good(0)
    refused("dispatch", "layout is \\['rank'\\]; expected", 0, lambda: buf.dispatch(x, ids, layout=["rank"]))
    for alignment in (1.5, "4", 2**40, 2**80, None):
        refused(
            "dispatch",
            "expert_alignment is .*; expected an int in 1..65536",
            0,
            lambda a=alignment: buf.dispatch(x, ids, expert_alignment=a),
        )
    assert buf.dispatch(x, ids, expert_alignment=np.int32(4), capacity=np.int64(64)).x.shape == (64, H)
