"""Migration while layers run, and lost ranks: results stay equal, and losses are reported."""

import pytest
import torch
from emulated_gpu import either_world  # noqa: F401 - a fixture
from migrating import (
    EXPERTS,
    LAYERS,
    TOKENS,
    TOP_K,
    dense,
    forward,
    local_weights,
    make_buffer,
    model,
    placements,
)
from worlds import assert_same

import moecomm
from moecomm.balance import Placement

pytestmark = pytest.mark.usefixtures("either_world")


@pytest.mark.parametrize("per_node", [4, 2])
@pytest.mark.parametrize("row_bytes", [1 << 16, 96])
def test_forward_is_the_same_before_during_and_after(per_node, row_bytes, monkeypatch):
    from moecomm.balance import multicast, rows

    # Whole slots in sequence, and slots in several pieces; one round and many.
    monkeypatch.setattr(rows, "_ROW_BYTES", row_bytes // 3 // 16 * 16)
    monkeypatch.setattr(rows, "_ROWS_PER_ROUND", 2)
    monkeypatch.setattr(multicast, "_STAGE_BYTES", row_bytes)
    weights, xs, ids = model()
    old, new = placements()

    def rank_main(comm):
        r = comm.rank
        buf = make_buffer(comm, old)
        local = local_weights(weights, old, r)
        before = [{k: t.clone() for k, t in w.items()} for w in local]
        ys = [forward(buf, local, xs[r], ids[r])]
        pending = new.migrate(local, comm)
        assert pending.version == new.version == old.version + 1
        ys += [forward(buf, local, xs[r], ids[r]) for _ in range(3)]
        moved = pending.wait()
        assert pending.done() and pending.layers_done == LAYERS
        ys.append(forward(buf, local, xs[r], ids[r]))  # complete, but not applied yet
        for kept, w in zip(before, local):
            for name in kept:
                assert_same(w[name], kept[name], "the old weights are only read")
        buf.use(new)
        ys.append(forward(buf, moved, xs[r], ids[r]))
        for layer, (got, want) in enumerate(zip(moved, local_weights(weights, new, r))):
            for name in want:
                assert_same(got[name], want[name], f"layer {layer}: {name}")
        comm.barrier()
        return ys

    for r, ys in enumerate(moecomm.run_local(rank_main, 4, ranks_per_node=per_node)):
        for y in ys:
            assert_same(y, dense(weights, xs[r], ids[r]), f"rank {r}")


def test_layers_that_stay_are_not_copied():
    weights, _, _ = model()
    old, _ = placements()
    table = old.physical_to_logical.clone()
    swap = next(
        i
        for i in range(3, 12)
        if table[1, i] not in table[1, :3] and table[1, 0] not in table[1, i // 3 * 3 : i // 3 * 3 + 3]
    )
    table[1, [0, swap]] = table[1, [swap, 0]]
    new = Placement(table, EXPERTS, 4, version=1, previous=old)

    def rank_main(comm):
        local = local_weights(weights, old, comm.rank)
        moved = new.migrate(local, comm).wait()
        changed = comm.rank in (0, swap // 3)
        assert [a["w"] is b["w"] for a, b in zip(moved, local)] == [True, not changed, True]
        assert_same(moved[1]["w"], local_weights(weights, new, comm.rank)[1]["w"], "layer 1")
        comm.barrier()

    moecomm.run_local(rank_main, 4)


class Dying(list):
    """Weights of a rank that stops during the migration."""

    def __getitem__(self, layer):
        if layer == 1:
            raise SystemError("this rank dies now")
        return super().__getitem__(layer)


def test_a_rank_that_dies_in_the_middle_leaves_the_others_on_the_old_placement():
    weights, xs, ids = model()
    old, new = placements()
    dead = 3

    def rank_main(comm):
        r = comm.rank
        local = local_weights(weights, old, r)
        kept = [{k: t.clone() for k, t in w.items()} for w in local]
        buf = make_buffer(comm, old)
        pending = new.migrate(Dying(local) if r == dead else local, comm)
        with pytest.raises(SystemError if r == dead else (moecomm.PeerTimeout, moecomm.PeerLost)):
            pending.wait()
        if r == dead:
            return None
        for a, b in zip(local, kept):
            assert_same(a["w"], b["w"], "the old weights")
        assert buf.backend.router.placement is old
        # The survivors continue with the old placement.
        buf.close()  # on a GPU its kernels would still occupy multiprocessors
        left = comm.shrink([0, 1, 2])
        survivors = make_buffer(left, old.surviving([0, 1, 2]))
        y, lost = [], []
        for layer in range(LAYERS):
            out = survivors.dispatch(xs[r], ids[r][layer].contiguous(), layer=layer)
            y.append(
                survivors.combine(
                    out.x * torch.repeat_interleave(local[layer]["w"], out.tokens_per_expert, 0), out.handle
                )
            )
            lost.append(out.lost_weight)
        left.barrier()
        return torch.stack(y) + 0.0, torch.stack(lost)

    outs = moecomm.run_local(rank_main, 4, ranks_per_node=4, timeout=4.0)
    gone = old.surviving([0, 1, 2]).replica_count == 0
    assert gone.any(), "the test needs experts that only the dead rank had"
    for r in range(3):
        y, lost = outs[r]
        masked = weights * ~gone[:, :, None]
        assert_same(y, dense(masked, xs[r], ids[r]), f"rank {r}")
        assert_same(
            lost, torch.stack([gone[i][ids[r][i]].sum(1).float() for i in range(LAYERS)]), "lost weight"
        )


# -- lost ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("mode", ["local", "even", "optimal"])
def test_tokens_of_a_lost_rank_go_to_surviving_replicas(mode, renormalize):
    _weights, xs, ids = model(seed=3)
    table = torch.tensor([[0, 1, 2, 3, 4, 0, 5, 6, 1, 7, 2, 5]]).repeat(
        LAYERS, 1
    )  # only rank 3 has 7; 2 and 5 have replicas elsewhere
    whole = Placement(table, EXPERTS, 4)
    share = torch.rand((4, TOKENS, TOP_K), generator=torch.Generator().manual_seed(5))

    def rank_main(comm):
        r = comm.rank
        if r == 3:
            return None
        left = comm.shrink([0, 1, 2])
        assert (left.size, left.rank) == (3, r)
        placement = whole.surviving([0, 1, 2], num_nodes=left.num_nodes)
        buf = make_buffer(left, placement, replicas=mode, renormalize=renormalize)
        out = buf.dispatch(xs[r], ids[r][0].contiguous(), share[r])
        y = buf.combine(out.x.clone(), out.handle, topk_weights=out.topk_weights)
        left.barrier()
        return y, out.lost_weight

    outs = moecomm.run_local(rank_main, 4, ranks_per_node=2, timeout=10.0)
    for r in range(3):
        y, lost = outs[r]
        gone = ids[r][0] == 7
        assert gone.any()
        torch.testing.assert_close(lost, (share[r] * gone).sum(1))
        kept = share[r] * ~gone
        if renormalize:
            kept = kept * (share[r].sum(1) / kept.sum(1))[:, None]
        torch.testing.assert_close(y, xs[r] * kept.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "size,per_node,alive,nodes",
    [(4, 2, [0, 1, 2], (3, 1)), (4, 2, [1, 3], (2, 1)), (6, 3, [0, 1, 3, 4], (2, 2)), (3, 3, [0, 2], (1, 2))],
)
def test_shrink_keeps_nodes_where_it_can(size, per_node, alive, nodes):
    def rank_main(comm):
        if comm.rank not in alive:
            with pytest.raises(moecomm.InvalidArgument, match="alive is"):
                comm.shrink(alive)
            return None
        for _ in range(2):  # a second world of the same ranks is independent
            left = comm.shrink(alive)
            left.barrier()
        return left.num_nodes, left.ranks_per_node

    assert [m for m in moecomm.run_local(rank_main, size, ranks_per_node=per_node) if m] == [nodes] * len(
        alive
    )


def test_migrate_names_what_does_not_fit():
    alone = Placement(torch.arange(EXPERTS).repeat(LAYERS, 1), EXPERTS, 1)

    def rank_main(comm):
        local = [torch.zeros(EXPERTS, 2) for _ in range(LAYERS)]
        with pytest.raises(moecomm.InvalidArgument, match="weights is 2"):
            alone.migrate(local[:2], comm)
        with pytest.raises(moecomm.InvalidArgument, match=r"weights\[0\] is"):
            alone.migrate([t[1:] for t in local], comm)
        with pytest.raises(moecomm.InvalidArgument, match="comm is"):
            placements()[1].migrate(local, comm)
        assert all(a is b for a, b in zip(alone.migrate(local, comm).wait(), local)), "nothing to move"

    moecomm.run_local(rank_main, 1)
