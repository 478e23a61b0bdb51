"""Counters prove the deduplication: the rows on each hop are exactly those that the routing needs."""

import pytest
import torch
from worlds import random_world

import moecomm

HIDDEN, TOP_K, PER_RANK = 64, 6, 4


def expected_rows(ids, size, per_node):
    """Return the (logical, physical) rows of the rail and node hops of dispatch, then of combine, by rank.

    Dispatch: one row per token and destination node on the rail; one row per token and destination rank on the node
    hop, counted at the gateway. Combine: one reduced row per token and node, counted at the end of the rail (or in
    the node); the gateway reads one row per pick on the node hop.
    """
    out = [
        {
            "dispatch": {"rail": [0, 0], "node": [0, 0]},
            "combine": {"rail": [0, 0], "node": [0, 0]},
            "copies": 0,
        }
        for _ in range(size)
    ]
    for source in range(size):
        own, local = divmod(source, per_node)
        for row in ids[source].tolist():
            picks = [e for e in row if e >= 0]
            ranks = {e // PER_RANK for e in picks}
            for node in {r // per_node for r in ranks}:
                gateway = node * per_node + local
                for counter, at in (
                    (out[source]["dispatch"]["rail"], node != own),
                    (out[gateway]["combine"]["rail"], node != own),
                ):
                    counter[0] += 1
                    counter[1] += at
                for r in ranks:
                    if r // per_node != node:
                        continue
                    out[gateway]["dispatch"]["node"][0] += 1
                    out[gateway]["dispatch"]["node"][1] += r != gateway
                for e in picks:
                    if e // PER_RANK // per_node != node:
                        continue
                    out[gateway]["combine"]["node"][0] += 1
                    out[gateway]["combine"]["node"][1] += e // PER_RANK != gateway
            for r in ranks:
                out[r]["copies"] += sum(e // PER_RANK == r for e in picks) - 1
    return out


@pytest.mark.parametrize("nodes,per_node", [(1, 1), (2, 1), (1, 3), (3, 2), (2, 4), (5, 1)])
def test_one_row_per_token_and_node_then_one_per_rank(nodes, per_node):
    size = nodes * per_node
    xs, ids, weights = random_world(
        size,
        [7 * r % 23 for r in range(size)],
        HIDDEN,
        PER_RANK * size,
        min(TOP_K, PER_RANK * size),
        seed=size,
    )
    want = expected_rows(ids, size, per_node)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=PER_RANK * size, top_k=ids[r].shape[1], max_tokens=32
        )
        out = buf.dispatch(xs[r], ids[r], weights[r])
        sent = buf.stats()
        assert sent["calls"] == 1 and sent["staged_rows"] == 0
        buf.combine(out.handle.rows, out.handle)
        back = buf.stats()
        assert buf.stats()["calls"] == 0  # reading resets
        buf.combine(out.handle.rows.clone(), out.handle)
        assert buf.stats()["staged_rows"] == out.handle.num_rows
        comm.barrier()
        return sent, back

    for rank, (sent, back) in enumerate(moecomm.run_local(main, size, ranks_per_node=per_node)):
        for op, stats in (("dispatch", sent), ("combine", back)):
            for hop in ("rail", "node"):
                logical, physical = want[rank][op][hop]
                where = f"rank {rank}, {op}, {hop}"
                assert [stats[hop]["logical_rows"], stats[hop]["physical_rows"]] == [logical, physical], where
                assert [stats[hop]["logical_bytes"], stats[hop]["physical_bytes"]] == [
                    logical * HIDDEN * 2,
                    physical * HIDDEN * 2,
                ], where
        assert sent["replicated_rows"] == want[rank]["copies"]


def test_a_token_for_every_expert_crosses_each_hop_once():
    """16 picks of one token on another node: one row over the rail, one to each rank there, one row back."""

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=HIDDEN, num_experts=32, top_k=16, max_tokens=1)
        here = comm.rank == 0
        x = torch.randn(1 if here else 0, HIDDEN).bfloat16()
        ids = torch.arange(16, 32)[None] if here else torch.empty((0, 16), dtype=torch.int64)
        out = buf.dispatch(x, ids)
        sent = buf.stats()
        buf.combine(out.handle.rows, out.handle)
        back = buf.stats()
        comm.barrier()
        return sent, back

    results = moecomm.run_local(main, 8, ranks_per_node=4)
    rows = lambda i, hop: [stats[i][hop]["physical_rows"] for stats in results]  # noqa: E731
    assert rows(0, "rail") == [1, 0, 0, 0, 0, 0, 0, 0]
    assert rows(0, "node") == [0, 0, 0, 0, 3, 0, 0, 0]
    assert rows(1, "rail") == [0, 0, 0, 0, 1, 0, 0, 0]
    assert sum(stats[0]["replicated_rows"] for stats in results) == 12
