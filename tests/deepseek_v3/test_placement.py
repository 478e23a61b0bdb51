"""A placement is planned in the background while steps count tokens."""

import threading

import numpy as np
import torch

import moecomm
from examples.deepseek_v3.serve.config import UnitShape
from examples.deepseek_v3.serve.experts import PlacedExperts


class Used:
    """Replaces a Buffer."""

    def __init__(self):
        self.placement = None

    def use(self, placement):
        self.placement = placement


def test_all_ranks_plan_for_the_counts_of_one_moment():
    """Rank 1 plans later, when its step has counted more tokens; both ranks must solve the same problem."""
    experts, layers = 8, 2
    draw = np.random.default_rng()
    skewed = [draw.permutation([900, 500, 300, 10, 10, 10, 10, 10]) for _ in range(2)]
    weights = [(torch.rand(experts, 4, 2), torch.rand(experts, 2, 2)) for _ in range(layers)]
    counted = threading.Event()

    def rank_main(comm):
        placed = PlacedExperts(comm, UnitShape(2, 2, redundant=2), weights)
        placed.buffer = Used()
        for layer in range(layers):
            placed.monitor.record(layer, skewed[0], everywhere=True)
        if comm.rank == 1:
            placed._background.submit(counted.wait, 60)  # the plan starts after it
        placed.change("plan")
        if comm.rank == 1:
            for layer in range(layers):
                placed.monitor.record(layer, skewed[1][::-1] * 100, everywhere=True)
            counted.set()
        new, moved, load = placed._pending.result()
        placed.change("use")
        found = new.physical_to_logical, load
        comm.barrier()
        placed.close()
        comm.barrier()
        return *found, moved

    (table, load, first), (other, same, second) = moecomm.run_local(rank_main, 2, timeout=20)
    assert torch.equal(table, other) and torch.equal(load, same)
    half = table.shape[1] // 2
    for layer, (gate_up, down) in enumerate(weights):
        for ids, mine in ((table[layer, :half], first), (table[layer, half:], second)):
            assert torch.equal(mine[layer]["gate_up"], gate_up[ids])
            assert torch.equal(mine[layer]["down"], down[ids])
