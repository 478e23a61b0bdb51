"""A Domain's verbs against the oracle, on one node and several, with loads and stores and with UCX."""

import random

import pytest
import torch
from fabric_cases import check_program, summed
from worlds import assert_same

import moecomm
from moecomm import CapacityExceeded, ConfigMismatch, InvalidArgument
from moecomm.fabric import Domain, Multicast, Reduce

WORLDS = [(4, 4), (4, 2), (8, 4), (3, 1), (1, 1)]


def run(main, size, per_node, timeout=120.0):
    return moecomm.run_local(main, size, ranks_per_node=per_node, timeout=timeout)


@pytest.mark.parametrize("size,per_node", WORLDS)
def test_random_programs_equal_the_oracle(size, per_node):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    run(lambda comm: check_program(comm, seed, 30), size, per_node)


@pytest.mark.parametrize("tls", ["tcp,self", None])
def test_random_programs_over_ucx(monkeypatch, tls):
    monkeypatch.setenv("MOECOMM_RAIL", "ucx")
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    seed = random.randrange(1 << 30)
    print("seed", seed)
    run(lambda comm: check_program(comm, seed, 25, long=501), 4, 2)


def test_a_multicast_puts_one_copy_on_each_link():
    rows, hidden = 16, 7168

    def main(comm):
        domain = Domain(comm, 1 << 20)
        dst = domain.tensor((rows, hidden))
        src = torch.randn(rows, hidden).bfloat16() if comm.rank == 1 else None
        domain.stats()
        domain.multicast([0, 2, 3, 4, 6, 7], dst, src, root=1)
        return domain.stats()

    stats = run(main, 8, 4)
    size = rows * hidden * 2
    links = [[n // size for n in s["links"]] for s in stats]
    assert all(n % size == 0 for s in stats for n in s["links"])
    assert max(map(max, links)) == 1
    assert links[1] == [
        1,
        0,
        1,
        1,
        1,
        0,
        0,
        0,
    ]  # rank 5, on the root's rail, is not a receiver: rank 4 gets the data
    assert links[4] == [0, 0, 0, 0, 0, 0, 1, 1]
    assert sum(map(sum, links)) == 6
    assert sum(s["rail"]["physical_bytes"] for s in stats) == size  # replicas: 3, nodes: 1
    assert sum(s["rail"]["logical_bytes"] for s in stats) == 3 * size
    assert sum(s["node"]["physical_bytes"] for s in stats) == 5 * size


def test_a_reduction_puts_one_row_per_node_on_the_rail():
    def main(comm):
        domain = Domain(comm, 1 << 22)
        src = domain.tensor((16, 7168))
        src.fill_(comm.rank)
        out = torch.empty(16, 7168).bfloat16() if comm.rank == 2 else None
        domain.stats()
        domain.reduce(range(8), out, src, root=2)
        if out is not None:
            assert (out == 28).all()
        return domain.stats()

    stats = run(main, 8, 2)
    size = 16 * 7168 * 2
    assert sum(s["rail"]["physical_bytes"] for s in stats) == 3 * size
    assert [s["links"][2] // size for s in stats] == [1, 0, 0, 0, 1, 0, 1, 0]  # the gateways


def test_bits_of_a_reduction_do_not_depend_on_timing():
    rows = [torch.randn(5000, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(8)]

    def main(comm):
        domain = Domain(comm, 1 << 20)
        src = domain.tensor(5000)
        src.copy_(rows[comm.rank])
        for i in range(30):
            for _ in range(random.randrange(2000)):  # ranks arrive in any order
                pass
            out = torch.empty(5000).bfloat16() if comm.rank == i % 8 else None
            domain.reduce(range(8), out, src, root=i % 8)
            if out is not None:
                assert_same(out, summed(rows, range(8), i % 8, 4), f"round {i}")

    run(main, 8, 4)


def test_rows_longer_than_the_ring_of_sums():
    """More sums are in flight than a gateway has positions for."""

    def main(comm):
        domain = Domain(comm, 1 << 24)
        src = domain.tensor(1_500_000, torch.float32)
        src.copy_(torch.arange(1_500_000) % 1000 + comm.rank)
        roots = list(range(4))
        outs = [torch.empty(1_500_000) if comm.rank == r else None for r in roots]
        domain.submit([Reduce(range(4), src, r, outs[r]) for r in roots])
        assert (outs[comm.rank] == 4 * (torch.arange(1_500_000) % 1000) + 6).all()

    run(main, 4, 2)


def test_memory_is_symmetric_and_comes_back():
    def main(comm):
        domain = Domain(comm, 4096)
        a, b = domain.tensor((3, 5), torch.float32), domain.tensor(0)
        c = domain.tensor(256, torch.float32)
        assert a.shape == (3, 5) and b.shape == (0,)
        with pytest.raises(CapacityExceeded, match="free piece"):
            domain.tensor(1024, torch.float32)
        offset = a.data_ptr() - domain._begin
        domain.free(a)
        assert domain.tensor(10, torch.int64).data_ptr() - domain._begin == offset
        with pytest.raises(InvalidArgument, match=r"free: tensor is .*not free yet"):
            domain.free(c[1:])
        if comm.size > 1:
            with pytest.raises(ConfigMismatch, match="shape differs"):
                domain.tensor(4 + comm.rank)
        kept = c
        kept.fill_(1)
        comm.barrier()
        domain.close()
        assert kept.sum() == 256
        with pytest.raises(InvalidArgument, match="closed"):
            domain.write(0, kept, kept)

    run(main, 2, 1)
    run(main, 1, 1)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8)


def plain_calls(comm, domain, ranks):
    """Make every call with one contiguous tensor on each side, and check its result."""
    n, last = comm.size, comm.size - 1
    for dtype in DTYPES:
        box, src = domain.tensor((n, 3, 5), dtype), torch.full((3, 5), comm.rank + 1).to(dtype)
        box.zero_()
        comm.barrier()
        right, left = (comm.rank + 1) % n, (comm.rank - 1) % n
        domain.write(right, box[comm.rank], src, counter=0)
        domain.wait(left, 0, domain.counter(left, 0) // src.nbytes * src.nbytes or src.nbytes)
        domain.fence()
        comm.barrier()
        assert (box[left] == left + 1).all()
        got = torch.empty_like(src)
        domain.read(right, got, box[comm.rank])
        assert (got == comm.rank + 1).all()
        domain.multicast(ranks, box[0], src if comm.rank == last else None, root=last)
        assert (box[0] == n).all()
        if dtype.is_floating_point:
            box[1].fill_(comm.rank)
            domain.reduce(ranks, got if comm.rank == 1 else None, box[1], root=1)
            assert comm.rank != 1 or (got == n * (n - 1) // 2).all()
        comm.barrier()
        domain.free(box)


def test_calls_of_one_run_take_the_short_way(monkeypatch):
    def long_way(*_):
        raise AssertionError("the checks in Python")

    monkeypatch.setattr(Domain, "_one_sided", long_way)
    monkeypatch.setattr(Domain, "_group_call", long_way)
    run(lambda comm: plain_calls(comm, Domain(comm, 1 << 16), range(comm.size)), 4, 2)


@pytest.mark.parametrize("way", [torch.arange, lambda n: list(reversed(range(n)))])
def test_ranks_on_the_short_and_on_the_long_way_meet(way):
    run(
        lambda comm: plain_calls(
            comm, Domain(comm, 1 << 16), way(comm.size) if comm.rank in (1, 3) else list(range(comm.size))
        ),
        4,
        2,
    )


def test_what_the_short_way_does_not_know_takes_the_long_one():
    def main(comm):
        domain = Domain(comm, 1 << 16)
        t, other = domain.tensor((4, 4), torch.float32), (comm.rank + 1) % 2
        t.fill_(comm.rank)
        comm.barrier()
        z = torch.view_as_complex(torch.randn(4, 4, 2))
        domain.write(other, t.t(), torch.arange(16.0).view(4, 4))  # strided
        domain.fence()
        comm.barrier()
        assert (t.t() == torch.arange(16.0).view(4, 4)).all()
        comm.barrier()
        with pytest.raises(InvalidArgument, match="negated view"):
            domain.write(other, t, z.conj().imag)
        parameter = torch.nn.Parameter(torch.ones(4, 4))
        with pytest.raises(InvalidArgument, match="gradient"):
            domain.write(other, t, parameter)
        with torch.no_grad():
            domain.write(other, t, parameter)
        domain.fence()
        comm.barrier()
        assert (t == 1).all()
        domain.write(other, t[:0], t[:0])
        freed = torch.ones(4, 4)
        freed.untyped_storage().resize_(0)
        with pytest.raises(InvalidArgument, match="storage"):
            domain.write(other, t, freed)

    run(main, 2, 1)


def wrong_calls(domain, t, r):
    """Return [(an invalid call, its error)] of requests to rank r."""
    other = torch.empty(8, 4)
    overlap = [(lambda: domain.write(r, t[:4], t[2:6]), "dst is .*overlap")] if r == domain.rank else []
    return [
        *overlap,
        (lambda: domain.write(9, t, other), "dst_rank is 9; expected an int in 0"),
        (
            lambda: domain.write(r, other, other),
            "dst is .* not symmetric; expected a tensor from domain.tensor",
        ),
        (lambda: domain.read(r, other, other), "src is .* not symmetric"),
        (lambda: domain.write(r, t, other[:3]), "src is .*expected dst's shape"),
        (lambda: domain.write(r, t, other.double()), "src is .*expected dst's dtype"),
        (lambda: domain.write(r, [t], [other, other]), "expected as many tensors as dst has, 1"),
        (lambda: domain.write(r, t, other, counter=4), "counter is 4"),
        (
            lambda: domain.write(r, t, other, dst_rows=torch.tensor([1, 1]), src_rows=torch.tensor([0, 1])),
            "distinct rows",
        ),
        (
            lambda: domain.write(r, t, other, dst_rows=torch.tensor([8]), src_rows=torch.tensor([0])),
            "dst_rows is 8",
        ),
        (lambda: domain.write(r, t, other, src_rows=torch.tensor([-1])), "src_rows is -1"),
        (
            lambda: domain.write(r, t, other, src_rows=torch.tensor([0])),
            "rows of src is 1; expected as many as of dst, 8",
        ),
        (lambda: domain.write(r, t[:1].expand(8, 4), other), "elements do not overlap"),
        (lambda: domain.write(r, t, other.requires_grad_()), "gradient"),
        (lambda: domain.write(r, t, "rows"), "src"),
        (lambda: domain.signal(r, 0, 0), "add is 0"),
        (lambda: domain.wait(-1, 0, 1), "src_rank is -1"),
        (lambda: domain.counter(0, 99), "counter is 99"),
    ]


def test_what_is_wrong_is_named():
    def main(comm):
        domain = Domain(comm, 1 << 16, counters=4)
        t = domain.tensor((8, 4), torch.float32)
        t.fill_(3)
        for call, text in wrong_calls(domain, t, comm.rank) + wrong_calls(domain, t, 1 - comm.rank):
            with pytest.raises(InvalidArgument, match=text):
                call()
        assert (t == 3).all()
        comm.barrier()
        for bad in (0, -1, None, "many"):
            with pytest.raises(InvalidArgument, match="bytes"):
                Domain(comm, bad)

    run(main, 2, 1)


REFUSED = {
    "ranks": (lambda d, t: d.multicast([0, 0], t, root=0), "distinct ranks"),
    "root": (lambda d, t: d.multicast([0], t, root=17), "root is 17"),
    "dst": (lambda d, t: d.multicast([0], torch.empty(3), root=0), "not symmetric"),
    "op": (lambda d, t: d.reduce([0], None, t, root=1, op="max"), "'sum'"),
    "dtype": (lambda d, t: d.reduce([0], None, t.view(torch.int32), root=1), "bfloat16, float16"),
    "accumulate": (lambda d, t: d.reduce([0], None, t, root=1, accumulate=torch.bfloat16), "accumulate"),
    "nothing": (lambda d, t: d.submit([]), "a list of Multicast"),
}


@pytest.mark.parametrize("size,per_node", [(4, 2), (2, 1), (3, 3)])
def test_a_refusal_reaches_every_rank_and_all_stay_in_step(size, per_node):
    def main(comm):
        domain = Domain(comm, 1 << 16)
        t = domain.tensor((8, 4), torch.float32)
        odd = size - 1
        for name, (call, text) in REFUSED.items():
            reduces = name in ("op", "dtype", "accumulate")
            if comm.rank == odd:
                with pytest.raises(InvalidArgument, match=text):
                    call(domain, t)
            else:
                with pytest.raises(InvalidArgument, match=f"rank {odd} refused its part"):
                    if reduces:
                        domain.reduce([0], torch.empty(8, 4), t, root=0)
                    else:
                        domain.multicast([0, 1], t, torch.ones(8, 4), root=0)
            t.fill_(-1)
            domain.multicast(range(size), t, torch.full((8, 4), 5.0) if comm.rank == 1 else None, root=1)
            assert (t == 5).all(), name

    run(main, size, per_node)


def test_ranks_that_disagree_all_learn_it():
    def main(comm):
        domain = Domain(comm, 1 << 16)
        t = domain.tensor((8, 4), torch.float32)
        t.fill_(1)
        src = torch.zeros(8, 4)
        for ranks, root, view in (
            ([0, 1, 3], comm.rank // 3, t),
            (list(range(comm.rank + 1)), 0, t),
            ([0, 1], 1, t[:, : 4 - comm.rank % 2]),
        ):
            with pytest.raises(ConfigMismatch, match=r"rank \d passed another root"):
                domain.multicast(ranks, view, src[: len(view), : view.shape[1]], root=root)
            assert (t == 1).all()
        domain.multicast(range(4), t, src, root=0)
        assert (t == 0).all()

    run(main, 4, 2)


def test_calls_of_other_kinds_are_told_apart():
    """A dispatch meets a multicast: all ranks raise an error that names the other call."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=2, top_k=1, max_tokens=1)
        domain = Domain(comm, 1 << 12)
        t = domain.tensor(8)
        with pytest.raises(ConfigMismatch, match="multicast" if comm.rank else "dispatch|multicast"):
            if comm.rank:
                domain.multicast([0, 1], t, root=0)
            else:
                buf.dispatch(torch.ones(1, 16).bfloat16(), torch.tensor([[0]]))

    run(main, 2, 2, timeout=10.0)


def test_asynchronous_requests_complete_in_order():
    def main(comm):
        domain = Domain(comm, 1 << 22)
        t = domain.tensor(100_000, torch.float32)
        last = (comm.rank + 1) % comm.size
        pending = [
            domain.write(last, t, torch.full((100_000,), float(i)), counter=0, async_op=True)
            for i in range(5)
        ]
        wait = domain.wait((comm.rank - 1) % comm.size, 0, 5 * 400_000, async_op=True)
        for p in pending:
            assert p.wait() is None
        wait.wait()
        assert (t == 4).all()
        comm.barrier()
        src = torch.arange(100_000).float() if comm.rank == 0 else None
        m = domain.multicast(range(comm.size), t, src, root=0, async_op=True)
        m.wait()
        assert (t == torch.arange(100_000)).all()

    run(main, 4, 2)


def test_lists_of_tensors_are_one_request():
    def main(comm):
        domain = Domain(comm, 1 << 16)
        a, b = domain.tensor((4, 4), torch.float32), domain.tensor(10, torch.int32)
        x, y = torch.randn(4, 4), torch.arange(10, dtype=torch.int32)
        domain.write(comm.rank, [a, b], [x, y])
        assert (a == x).all() and (b == y).all()
        p, q = torch.empty(4, 4), torch.empty(10, dtype=torch.int32)
        domain.read(comm.rank, [p, q], [a, b])
        assert (p == x).all() and (q == y).all()
        assert domain.stats()["calls"] == 2
        domain.submit([Multicast([0], [a, b], 0, [x + 1, y + 1])])
        assert (a == x + 1).all() and (b == y + 1).all()

    run(main, 1, 1)
