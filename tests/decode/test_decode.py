"""The decode path on rank threads, against the oracle, bit for bit; order and delays."""

import time

import numpy as np
import pytest
import torch
from decode_steps import check_dispatch, check_step, make_buffer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import assert_same, random_ids, random_world

import moecomm

GEOMETRIES = [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4)]  # nodes x ranks per node


def worlds_of(size, steps, hidden=64, top_k=4, dtype=torch.bfloat16, most=8, seed=0):
    """Make random worlds with changing numbers of tokens, from 0 to the maximum."""
    top_k = min(top_k, 4 * size)
    return [
        random_world(
            size,
            [(3 + 5 * r + i) % (most + 1) for r in range(size)],
            hidden,
            4 * size,
            top_k,
            dtype,
            seed=seed + i,
        )
        for i in range(steps)
    ]


# -- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("nodes,per_node", GEOMETRIES)
def test_geometries(nodes, per_node, weights_travel):
    worlds = worlds_of(nodes * per_node, 5)

    def main(comm):
        buf = make_buffer(comm, worlds[0], decode=True)
        for i, world in enumerate(worlds):
            check_step(
                comm, buf, world, weights_travel=weights_travel, return_hook=i % 2 == 0, in_place=i % 3 != 0
            )

    moecomm.run_local(main, nodes * per_node, ranks_per_node=per_node, timeout=20)


@pytest.mark.parametrize(
    "hidden,top_k,dtype",
    [
        (8, 1, torch.bfloat16),
        (200, 3, torch.float16),
        (4, 2, torch.float32),
        (1000, 4, torch.float32),
        (2, 4, torch.float64),
        (136, 32, torch.bfloat16),
    ],
)
def test_rows_of_every_kind(hidden, top_k, dtype):
    size = 8 if top_k > 16 else 4
    worlds = worlds_of(size, 4, hidden, top_k, dtype)

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        for i, (xs, ids, weights) in enumerate(worlds):
            check_step(
                comm,
                buf,
                (xs, [i.to(torch.int32) for i in ids] if i % 2 else ids, weights),
                weights_travel=i > 1,
            )

    moecomm.run_local(main, size, ranks_per_node=size // 2, timeout=20)


@pytest.mark.parametrize("scale_layout", ["row", "column"])
@pytest.mark.parametrize("scheme", ["fp8", "fp8_ue8m0"])
def test_quantized_on_the_way_out(scheme, scale_layout):
    size, hidden = 4, 720  # six tiles, the last one partial
    worlds = worlds_of(size, 4, hidden)

    def main(comm):
        buf = make_buffer(comm, worlds[0], max_tokens=9)
        for i, world in enumerate(worlds):
            buf.stats()
            recv, _ = check_dispatch(
                comm, buf, world, scheme=scheme, prepared=i % 2 == 1, scale_layout=scale_layout
            )
            picked = int((world[1][comm.rank] >= 0).any(1).sum())
            assert buf.stats()["decode"]["quantized_rows"] == (0 if i % 2 else picked), (
                "every row is quantized once"
            )
            words = recv.scales.shape[2]
            assert (
                recv.scales.stride()[1:] == ((1, 36) if scale_layout == "column" else (words, 1))
                and recv.scales.data_ptr() % 16 == 0
            )
            assert recv.x.dtype == torch.float8_e4m3fn

    moecomm.run_local(main, size, ranks_per_node=2, timeout=20)


@pytest.mark.parametrize("weights_travel", [False, True])
@pytest.mark.parametrize("wire", ["fp8", "logfmt10"])
@pytest.mark.parametrize("hidden", [144, 1032])
def test_answers_over_a_wire(wire, weights_travel, hidden):
    worlds = worlds_of(4, 3, hidden)

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        for i, world in enumerate(worlds):
            check_step(comm, buf, world, wire=wire, weights_travel=weights_travel, in_place=i % 2 == 0)

    moecomm.run_local(main, 4, ranks_per_node=2, timeout=20)


STEP = st.tuples(
    st.sampled_from(["step", "step", "dispatch", "no hook", "no last hook"]),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1),
    st.lists(st.integers(0, 8), min_size=6, max_size=6),
    st.integers(0, 1 << 30),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([(1, 2), (2, 1), (1, 4), (2, 2), (3, 2)]), st.lists(STEP, min_size=1, max_size=7))
def test_random_sequences(geometry, steps):
    """Any mixture of steps, dispatches without a combine, hooks that are never called, empty ranks and masked picks."""
    size = geometry[0] * geometry[1]
    worlds = [
        random_world(size, tokens[:size], 32, 4 * size, min(4, 4 * size), seed=seed, masked=masked)
        for _, _, _, masked, tokens, seed in steps
    ]

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        for (kind, weights_travel, return_hook, *_), world in zip(steps, worlds, strict=True):
            xs, ids, weights = (part[comm.rank] for part in world)
            if kind == "step":
                check_step(comm, buf, world, weights_travel=weights_travel, return_hook=return_hook)
            elif kind == "dispatch":
                check_dispatch(comm, buf, world, weights_travel=weights_travel, return_hook=return_hook)
            elif kind == "no hook":
                buf.decode_dispatch(xs, ids, quant=None)
            else:
                recv, _ = check_dispatch(comm, buf, world)
                buf.decode_combine(recv.x, ids, weights, recv.handle)

    moecomm.run_local(main, size, ranks_per_node=geometry[1], timeout=20)


# -- epochs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_node,steps", [(2, 10_000), (4, 1000), (1, 1000)])
def test_ten_thousand_steps(per_node, steps):
    """The routing changes in every step.

    Every row contains its step, source and token, and their checksum.
    """
    size, most, top_k, routings = 4, 3, 3, 97
    rng = np.random.default_rng(per_node)
    count = rng.integers(0, most + 1, (routings, size))
    picks = [
        [random_ids(most, top_k, 2 * size, torch.Generator().manual_seed(97 * i + r)) for r in range(size)]
        for i in range(routings)
    ]

    def labels(step, source, token):
        """Return labels, [.., 4] int64: one row of 32 bytes."""
        step, source, token = np.broadcast_arrays(step, source, token)
        return np.stack(
            [
                step,
                source,
                token,
                (step * 1000003 + source * 10007 + token * 101 + 12345) * 0x9E3779B1 % (1 << 62),
            ],
            -1,
        )

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm, hidden=16, num_experts=2 * size, top_k=top_k, max_tokens=most, arena_bytes=1 << 16
        )
        x, y, ones = (
            torch.empty(most, 16).bfloat16(),
            torch.empty(most, 16).bfloat16(),
            torch.ones(most, top_k),
        )
        words, sums = x.view(torch.int64).numpy(), y.view(torch.int16).numpy()
        origin = [
            [
                np.array(
                    [(s, t) for s in range(size) for t in range(count[i, s]) if e in picks[i][s][t]],
                    dtype=np.int64,
                ).reshape(-1, 2)
                for e in (2 * r, 2 * r + 1)
            ]
            for i in range(routings)
        ]
        ids = [picks[i][r][: count[i, r]].contiguous() for i in range(routings)]
        small = torch.arange(61 * top_k).bfloat16().view(torch.int16).numpy()  # bits of the sums, all exact
        for step in range(steps):
            i = step % routings
            n = int(count[i, r])
            words[:n] = labels(step, r, np.arange(n))
            recv, hook = buf.decode_dispatch(x[:n], ids[i], quant=None)
            hook()
            got, rows = recv.x.view(torch.int64).numpy(), recv.handle.rows.view(torch.int16).numpy()
            for e in (0, 1):
                source, token = origin[i][e].T
                assert recv.counts[e] == len(token), (
                    f"step {step}: expert {2 * r + e} has {recv.counts[e]} rows, expected {len(token)}"
                )
                assert (got[e, : len(token)] == labels(step, source, token)).all(), (
                    f"step {step}: rows of expert {2 * r + e}"
                )
                rows[e, : len(token)] = small[(step + 7 * source + 3 * token + 5 * (2 * r + e)) % 61, None]
            if step % 5 == 4:
                continue  # no combine: the two directions differ in their epochs
            sums[:] = -1
            _, hook = buf.decode_combine(recv.handle.rows, ids[i], ones[:n], recv.handle, out=y[:n])
            hook()
            e = ids[i].numpy()
            want = np.where(e >= 0, (step + 7 * r + 3 * np.arange(n)[:, None] + 5 * e) % 61, 0).sum(1)
            assert (sums[:n] == small[want, None]).all() and (sums[n:] == -1).all(), f"step {step}: y"

    moecomm.run_local(main, size, ranks_per_node=per_node, timeout=30)


@pytest.mark.parametrize("late", [0, 3])
def test_a_rank_is_late(late):
    """A delay of 100 ms in each phase: the others wait, and no rows are lost or mixed up."""
    worlds = worlds_of(4, 5)

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        for i, world in enumerate(worlds):
            xs, ids, _ = (part[comm.rank] for part in world)
            pause = [0.1 if comm.rank == late and i == phase else 0 for phase in range(4)]
            time.sleep(pause[0])
            recv, hook = buf.decode_dispatch(xs, ids, quant=None)
            time.sleep(pause[1])
            hook()
            recv.handle.rows.copy_(recv.x)
            time.sleep(pause[2])
            y, hook = buf.decode_combine(recv.handle.rows, ids, (ids >= 0).float(), recv.handle)
            time.sleep(pause[3])
            hook()
            count = (ids >= 0).sum(1, keepdim=True)
            torch.testing.assert_close(y, (xs.float() * count).bfloat16(), rtol=0, atol=0)

    moecomm.run_local(main, 4, ranks_per_node=2, timeout=20)


def test_a_fast_rank_never_runs_over_a_slow_one():
    """Only dispatches, at random speeds: a slow rank still reads the right rows two epochs later."""
    worlds = worlds_of(4, 12)

    def main(comm):
        buf = make_buffer(comm, worlds[0])
        rng = np.random.default_rng(comm.rank)
        for i in range(120):
            if comm.rank in (1, 2):
                time.sleep(rng.random() * 0.004)
            check_dispatch(comm, buf, worlds[i % 12])

    moecomm.run_local(main, 4, ranks_per_node=2, timeout=20)


# -- memory and counters -----------------------------------------------------------------------------


def test_a_step_allocates_nothing_and_decides_nothing():
    """Outputs use the same memory every second step for any routing; the buffer reserves as much as its hint."""
    worlds = worlds_of(4, 8)

    def main(comm):
        options = dict(hidden=64, num_experts=16, top_k=4, max_tokens=8, arena_bytes=1 << 16)
        buf = moecomm.Buffer(comm, **options)
        before = buf.num_bytes
        assert before == moecomm.Buffer.size_hint(comm, **options)
        seen = []
        y = torch.empty(8, 64).bfloat16()
        for world in worlds:
            xs, ids, weights = (part[comm.rank] for part in world)
            recv, hook = buf.decode_dispatch(xs, ids, quant=None)
            hook()
            _, hook = buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, out=y[: len(xs)])
            hook()
            seen.append(tuple((t, t.data_ptr(), t.shape) for t in (recv.x, recv.counts, recv.handle.rows)))
            assert buf.num_bytes == moecomm.Buffer.size_hint(comm, decode=True, **options) > before
        for i, step in enumerate(seen):
            assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(step, seen[i % 2], strict=True))
        assert seen[0][0][1] != seen[1][0][1]
        stats = buf.stats()
        assert stats["decode"]["calls"] == 16 and stats["decode"]["staged_rows"] == 0 and stats["calls"] == 0
        return stats["decode"]

    moecomm.run_local(main, 4, ranks_per_node=2, timeout=20)


def test_counters_count():
    """Messages: one per token and rank. Answers: one per pick, or with weights one per token and rank."""
    size, per_node = 4, 2
    world = random_world(size, 8, 64, 4 * size, 6, seed=1)
    header, row = 64, 128

    def main(comm):
        buf = make_buffer(comm, world)
        r = comm.rank
        owner = torch.where(world[1][r] >= 0, world[1][r] // 4, -1)
        ranks = [[d for d in range(size) if d in o] for o in owner.tolist()]
        far = [d // per_node != comm.node for t in ranks for d in t]
        found = {}
        for weights_travel in (False, True):
            check_dispatch(comm, buf, world, weights_travel=weights_travel)
            sent = buf.stats()["decode"]
            assert sent["rail"] == dict(
                logical_rows=sum(far),
                physical_rows=sum(far),
                logical_bytes=sum(far) * row,
                physical_bytes=sum(far) * (row + header),
            ), "a message per token and rank of another node"
            others = len(far) - sum(far) - sum(r in t for t in ranks)
            assert sent["node"] == dict(
                logical_rows=len(far) - sum(far),
                physical_rows=others,
                logical_bytes=(len(far) - sum(far)) * row,
                physical_bytes=others * (row + header),
            )
            check_step(comm, buf, world, weights_travel=weights_travel, in_place=weights_travel)
            both = buf.stats()["decode"]
            found[weights_travel] = {
                hop: both[hop]["physical_rows"] - sent[hop]["physical_rows"] for hop in ("rail", "node")
            }
            picks = int(sum((i[(i >= 4 * r) & (i < 4 * r + 4)]).numel() for i in world[1]))
            assert both["staged_rows"] == (0 if weights_travel else picks)
        return found, [int(((owner // per_node != comm.node) & (owner >= 0)).sum()), sum(far)]

    results = moecomm.run_local(main, size, ranks_per_node=per_node, timeout=20)
    for answers, at in ((False, 0), (True, 1)):
        assert sum(found[answers]["rail"] for found, _ in results) == sum(want[at] for _, want in results)
    assert sum(found[True]["rail"] for found, _ in results) < sum(
        found[False]["rail"] for found, _ in results
    )


def test_memory_follows_ranks_tokens_and_row_bytes():
    """The memory for other ranks' messages is proportional to ranks * max_tokens * row bytes, up to 320 ranks."""
    from moecomm._native import core

    def region(size, tokens, hidden):
        return core.decode_bytes(0, size, 8, hidden, 0, size, 8, tokens)

    one = region(320, 32, 7168)
    assert (
        3.5 < region(320, 128, 7168) / one < 4.1
        and 1.9 < region(640, 32, 7168) / one < 2.1
        and 1.9 < region(320, 32, 14336) / one < 2.1
    )
    assert region(320, 128, 7168) < 8 * 320 * 128 * (2 * 7168 + 512)


def test_shapes_that_do_not_fit_are_refused():
    def main(comm):
        buf = moecomm.Buffer(
            comm, hidden=8, num_experts=1, top_k=1, max_tokens=(1 << 20) + 1, arena_bytes=1 << 16
        )
        with pytest.raises(moecomm.InvalidArgument, match="max_tokens is 1048577; expected at most 1048576"):
            buf.decode_dispatch(
                torch.zeros(1, 8).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), quant=None
            )

    moecomm.run_local(main, 1)


def test_results_do_not_depend_on_the_fast_path(monkeypatch):
    """Tensors that DLPack's table cannot read (here: a subclass) use the slow path, with the same bits."""

    class Plain(torch.Tensor):
        pass

    world = random_world(2, 5, 64, 8, 3, seed=6)

    def main(comm):
        buf = make_buffer(comm, world)
        xs, ids, weights = (part[comm.rank] for part in world)
        results = []
        for wrap in (lambda t: t, lambda t: t.as_subclass(Plain)):
            recv, _ = buf.decode_dispatch(wrap(xs), wrap(ids), quant=None, return_hook=False)
            recv.handle.rows.copy_(recv.x)
            results.append(
                buf.decode_combine(
                    recv.handle.rows,
                    wrap(ids),
                    wrap(weights),
                    recv.handle,
                    return_hook=False,
                    out=torch.empty_like(xs),
                )[0]
            )
        assert_same(*results, "y")

    moecomm.run_local(main, 2, timeout=20)
