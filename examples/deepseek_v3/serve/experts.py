"""Experts of a unit: their placement on the ranks, and its change while the unit serves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own spelling

from moecomm.balance import LoadMonitor, Placement, migrate, rebalance
from moecomm.fabric import Domain

from .config import slots_of


def swiglu(rows, gate_up, down, out):
    """Compute one SwiGLU expert: rows [N, hidden] to out [N, hidden]."""
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    torch.mm(F.silu(gate) * up, down.T, out=out)


class PlacedExperts:
    """The weights of this rank's expert slots in all layers, and the current placement.

    Parameters
    ----------
    comm : Communicator
        The ranks of the unit.
    shape : UnitShape
    layers : list of (gate_up [E, 2 * intermediate, hidden], down [E, hidden, intermediate])
        All experts of each layer. A rank copies those of its slots.
    num_groups : int
        Number of groups whose experts stay on one node. 1: no groups.
    policy : "load" or "shuffle"
        As for ServeConfig.
    """

    def __init__(self, comm, shape, layers, num_groups=1, policy="load"):
        self.comm, self.policy = comm, policy
        self.num_layers, self.num_experts = len(layers), len(layers[0][0])
        self._how = {
            "num_replicas": slots_of(shape, self.num_experts),
            # With groups, a replica needs another rank on the same node.
            "num_groups": num_groups if num_groups % comm.num_nodes == 0 and comm.ranks_per_node > 1 else 1,
            "num_nodes": comm.num_nodes,
            "num_ranks": comm.size,
        }
        self.placement = rebalance(torch.ones(self.num_layers, self.num_experts), **self._how)
        self.monitor = LoadMonitor(self.num_layers, self.num_experts, half_life=256.0)
        per_rank = self.placement.slots_per_rank
        mine = self.placement.physical_to_logical[:, comm.rank * per_rank : (comm.rank + 1) * per_rank]
        self.weights = [
            {"gate_up": gate_up[ids].contiguous(), "down": down[ids].contiguous()}
            for (gate_up, down), ids in zip(layers, mine, strict=True)
        ]
        self.buffer = None  # set by the owner, who makes it with .placement and .monitor
        self._pending = None
        self._background_comm = comm.duplicate()
        # For LoadMonitor.load: two tables of float64, and some room.
        self._totals = Domain(self._background_comm, 4096 + 3 * 8 * self.num_layers * self.num_experts)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="placement")

    def change(self, step):
        """Do the placement's part of a step: None, "plan" or "use". Only "use" is collective."""
        if step == "plan":
            # All ranks must plan with the same counts, and the dispatches of this step add counts. So make a copy.
            self._pending = self._background.submit(
                self._plan, self.placement, self.weights, self.monitor.copy()
            )
        elif step == "use":
            return self._use()
        return None

    @property
    def moving(self):
        """Whether the weights of this rank are still being moved. None: no change of the placement is under way.

        Raises
        ------
        MoecommError
            The migration failed.
        """
        if self._pending is None or not self._pending.done():
            return None if self._pending is None else True
        return False if self._pending.result() is not None else None

    def _plan(self, old, weights, monitor):
        """Sum the counts, compute a placement and move weights: (placement, weights, load), or None without moves.

        Runs in the background of the steps, on all ranks.
        """
        load = monitor.load(self._totals)
        if not load.any():
            return None
        if self.policy == "shuffle":
            seed = torch.Generator().manual_seed(old.version)
            table = rebalance(torch.rand(load.shape, generator=seed), **self._how).physical_to_logical
            new = Placement(table, old.num_experts, old.num_ranks, old.num_nodes, old.version + 1, old)
        else:
            new = rebalance(load, **self._how, previous=old)
        if not len(new.moves):  # the same on all ranks
            return None
        return new, migrate(new, weights, self._background_comm).wait(), load

    def _use(self):
        new, self.weights, load = self._pending.result()
        self.buffer.use(new)
        before, self.placement, self._pending = self.placement, new, None
        return {
            "version": new.version,
            "moved": len(new.moves),
            "balancedness": [before.balancedness(load), new.balancedness(load)],
        }

    def close(self):
        """End the background work. Local."""
        self._background.shutdown(wait=True, cancel_futures=True)
        self._totals.close()
        self._background_comm.close()
