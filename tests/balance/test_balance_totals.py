"""LoadMonitor.load over a Domain: sums on the way, with equal bits on all ranks."""

import numpy as np
import pytest
import torch

import moecomm
from moecomm.balance import LoadMonitor
from moecomm.fabric import Domain

LAYERS, EXPERTS, BATCHES = 3, 10, 4


def counts_of(seed, rank):
    draw = np.random.default_rng([seed, rank])
    return draw.integers(0, 1000, (BATCHES, LAYERS, EXPERTS))


def recorded(counts, **options):
    monitor = LoadMonitor(LAYERS, EXPERTS, half_life=3.0, **options)
    for batch in counts:
        for layer, picks in enumerate(batch):
            monitor.record(layer, picks)
    return monitor


@pytest.mark.parametrize("size, per_node", [(1, 1), (4, 4), (6, 2), (8, 4)])
def test_sums_are_those_of_all_ranks(size, per_node):
    seed = int(torch.randint(1 << 30, ()))

    def main(comm):
        monitor = recorded(counts_of(seed, comm.rank), window=2)
        domain = Domain(comm, 1 << 14)
        loads = []
        for _ in range(20):  # the memory is given back each time
            loads = [monitor.load(domain, weighted=False), monitor.load(domain)]
        return *loads, monitor.load(comm), domain.stats()

    every = [counts_of(seed, r) for r in range(size)]
    results = moecomm.run_local(main, size, ranks_per_node=per_node)
    for window, average, gathered, _ in results:
        assert torch.equal(window, torch.from_numpy(sum(c[-2:].sum(0) for c in every)).double())
        torch.testing.assert_close(average, gathered, rtol=1e-12, atol=0)
        assert torch.equal(average, results[0][1])  # the same bits on all ranks


def test_a_node_sends_one_row_per_part():
    def main(comm):
        monitor, domain = recorded(counts_of(1, comm.rank)), Domain(comm, 1 << 14)
        domain.stats()
        monitor.load(domain)
        return domain.stats()["rail"]

    sent = moecomm.run_local(main, 8, ranks_per_node=4)
    part = 8 * -(-(LAYERS * EXPERTS + 6) // 8)
    # Every node sends 4 sums for the other node's parts, and gets its own 4 totals across once.
    assert sum(s["physical_bytes"] for s in sent) == 2 * (4 + 4) * part


def test_nothing_is_sent_if_dispatch_has_exchanged_the_counts():
    def main(comm):
        monitor, domain = LoadMonitor(1, 4), Domain(comm, 64)
        monitor.record(0, np.arange(4), everywhere=True)
        return monitor.load(domain).tolist()

    assert moecomm.run_local(main, 2) == [[[0.0, 1.0, 2.0, 3.0]]] * 2


def refused(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


def test_ranks_that_ask_for_different_sums_are_refused_and_go_on():
    def main(comm):
        monitor, domain = recorded(counts_of(2, comm.rank)), Domain(comm, 1 << 14)
        refused(
            lambda: monitor.load(domain, weighted=comm.rank != 1),
            moecomm.ConfigMismatch,
            f"weighted is {int(comm.rank != 1)} on rank {comm.rank}",
        )
        # A table of another size, and one of another shape that takes as much memory.
        for shape, match in (
            ((3, 10 + comm.rank), "tensor"),
            ((1 + comm.rank % 2, 2 - comm.rank % 2), "layers is"),
        ):
            refused(lambda s=shape: LoadMonitor(*s, window=2).load(domain), moecomm.ConfigMismatch, match)
        return monitor.load(domain)

    results = moecomm.run_local(main, 4, ranks_per_node=2)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_domain_that_is_too_small_is_refused():
    def main(comm):
        domain = Domain(comm, 64)
        refused(lambda: recorded(counts_of(3, 0)).load(domain), moecomm.CapacityExceeded, "no free piece")

    moecomm.run_local(main, 2)


def test_advice_over_a_domain():
    placement = moecomm.balance.rebalance(np.ones((LAYERS, EXPERTS)), num_replicas=12, num_ranks=2)

    def main(comm):
        monitor, domain = recorded(counts_of(4, comm.rank)), Domain(comm, 1 << 14)
        ask = dict(seconds_per_row=1e-3, bytes_per_expert=1e6, bytes_per_second=1e9, batches=10)
        return monitor.advise(placement, comm=domain, **ask), monitor.advise(placement, comm=comm, **ask)

    for over_domain, over_bootstrap in moecomm.run_local(main, 2):
        assert over_domain.gain == pytest.approx(over_bootstrap.gain)
        assert over_domain.pays == over_bootstrap.pays
