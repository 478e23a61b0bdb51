"""Placements, migration and recordings with tensors on a real or emulated GPU.

More cases run on the emulated GPU in test_balance_*.py and test_record.py.
"""

import numpy as np
import pytest
import torch
from emulated_gpu import gpu  # noqa: F401 - a fixture
from worlds import assert_same, random_world

import moecomm
from moecomm import record
from moecomm.balance import Placement, copies, rebalance

pytestmark = pytest.mark.usefixtures("gpu")
SIZE, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 8, 3, 32, 12
TABLE = [[0, 1, 2, 3, 4, 0, 5, 6, 1, 7, 2, 5]]


def whole_numbers(size, seed):
    """Return (xs, ids, shares) by rank with whole numbers, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    xs = torch.randint(-3, 4, (size, TOKENS, HIDDEN), generator=g).float()
    ids = torch.rand((size, TOKENS, EXPERTS), generator=g).argsort(-1)[..., :TOP_K].contiguous()
    return xs, ids, torch.randint(1, 5, (size, TOKENS, TOP_K), generator=g).float()


SCALE = torch.randint(-4, 5, (EXPERTS, HIDDEN), generator=torch.Generator().manual_seed(1)).float()


def serve(comm, buf, local, batch, renormalized=False):
    """Run one batch through the experts (x * local[slot]).

    Its sum and its lost weight are compared with the sum over the remaining experts.
    """
    x, ids, shares = (t[comm.rank].to(comm.device) for t in batch)
    here, scale = (buf.backend.router.placement.replica_count[0] > 0).to(comm.device), SCALE.to(comm.device)
    out = buf.dispatch(x, ids, shares)
    y = buf.combine(
        out.x * torch.repeat_interleave(local, out.tokens_per_expert, 0),
        out.handle,
        topk_weights=out.topk_weights,
    )
    kept = shares * here[ids]
    assert out.lost_weight.device == comm.device
    assert_same(out.lost_weight.cpu(), (shares - kept).sum(1).cpu(), "lost weight")
    if renormalized:
        kept = kept * (shares.sum(1) / kept.sum(1))[:, None]
        assert torch.allclose(y, (x[:, None] * scale[ids] * kept[..., None]).sum(1), rtol=1e-4, atol=1e-3)
    else:
        assert_same((y + 0.0).cpu(), ((x[:, None] * scale[ids] * kept[..., None]).sum(1) + 0.0).cpu(), "y")


def weights_of(comm, placement):
    """Return the weights of this rank's slots, [S, H]."""
    return SCALE[placement.physical_to_logical[0].view(comm.size, -1)[comm.rank]].to(comm.device)


def make(comm, placement, **options):
    """Make a buffer with this placement."""
    return moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_tokens=TOKENS,
        dtype=torch.float32,
        num_sms=2,
        placement=placement,
        **options,
    )


def run(main, nodes):
    """Run main(comm) on rank threads."""
    return moecomm.run_local(main, SIZE, ranks_per_node=SIZE // nodes, device="cuda:0", timeout=20.0)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"replicas": "local"},
        {"replicas": "even"},
        {"replicas": "optimal"},
        {"replicas": "even", "activate": 2},
    ],
)
def test_replicas(nodes, options):
    def main(comm):
        placement = Placement(torch.tensor(TABLE), EXPERTS, SIZE, nodes)
        buf = make(comm, placement, **options)
        for seed in range(3):
            serve(comm, buf, weights_of(comm, placement), whole_numbers(SIZE, seed))
        comm.barrier()
        buf.close()

    run(main, nodes)


def test_decode_by_logical_ids():
    """Each pick reaches a slot of its expert: each expert multiplies by its number."""

    def main(comm):
        placement = Placement(torch.tensor(TABLE), EXPERTS, SIZE, 2)
        buf, local = make(comm, placement, decode=True), weights_of(comm, placement)
        for seed in range(3):
            x, ids, shares = (t[comm.rank].to(comm.device) for t in whole_numbers(SIZE, seed))
            recv, _ = buf.decode_dispatch(x, ids, quant=None, return_hook=False)
            recv.handle.rows.copy_(recv.x * local[:, None])
            y, _ = buf.decode_combine(recv.handle.rows, ids, shares, recv.handle, return_hook=False)
            assert_same(
                (y + 0.0).cpu(),
                ((x[:, None] * SCALE.to(comm.device)[ids] * shares[..., None]).sum(1) + 0.0).cpu(),
                "y",
            )
        comm.barrier()
        buf.close()

    run(main, 2)


def test_migration_beside_a_running_layer():
    def main(comm):
        old = Placement(torch.tensor(TABLE), EXPERTS, SIZE, 1)
        new = rebalance(
            torch.tensor([[1.0, 9, 1, 1, 9, 1, 1, 1]]),
            num_replicas=12,
            num_nodes=1,
            num_ranks=SIZE,
            previous=old,
        )
        buf, local = make(comm, old), weights_of(comm, old)
        migrating = new.migrate([local], comm)
        serve(comm, buf, local, whole_numbers(SIZE, 1))
        [moved] = migrating.wait()
        assert moved.device == comm.device
        assert_same(moved.cpu(), weights_of(comm, new).cpu(), "moved weights")
        assert_same(local.cpu(), weights_of(comm, old).cpu(), "the old ones")
        buf.use(new)
        serve(comm, buf, moved, whole_numbers(SIZE, 2))
        comm.barrier()
        buf.close()

    run(main, 1)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("maps", [True, False])
def test_who_launches_kernels_to_migrate(gpu, monkeypatch, nodes, maps):  # noqa: F811
    """Weights go by the copy engine where ranks map each other's memory. Else they are rows of a dispatch."""
    if gpu is None:
        pytest.skip("launches are counted on the emulated GPU")
    monkeypatch.setattr(copies, "_STAGE_BYTES", 4096)  # several rounds, and pieces of a slot
    old = Placement(torch.tensor(TABLE), EXPERTS, SIZE, nodes)
    new = Placement(torch.tensor([TABLE[0][3:] + TABLE[0][:3]]), EXPERTS, SIZE, nodes, previous=old)
    weights = torch.randn(EXPERTS, 1100, generator=torch.Generator().manual_seed(2))
    launches = []

    def main(comm):
        comm.maps_peers = maps

        def local(placement):
            mine = placement.physical_to_logical[0].view(comm.size, -1)[comm.rank]
            return {"w": weights[mine], "odd": weights[mine, :3].bfloat16()}

        comm.barrier()
        before = local(old)
        migrating = new.migrate([before], comm)
        [moved] = migrating.wait()
        launches.append(gpu.calls.emulated_launches())
        for name, want in local(new).items():
            assert_same(moved[name], want, name)
            assert_same(before[name], local(old)[name], "the old ones")
        traffic = migrating.traffic
        assert sum(traffic[hop]["physical_bytes"] for hop in ("node", "rail")) > 4400

    gpu.calls.emulated_launches()
    run(main, nodes)
    assert (sum(launches) == 0) == maps, launches


@pytest.mark.parametrize("renormalize", [False, True])
def test_what_is_left_after_a_rank_is_lost(renormalize):
    def main(comm):
        placement, alive = Placement(torch.tensor(TABLE), EXPERTS, SIZE, 2), [0, 2, 3]
        serve(comm, make(comm, placement), weights_of(comm, placement), whole_numbers(SIZE, 1))
        comm.barrier()
        if comm.rank == 1:
            return
        left = comm.shrink(alive)
        remaining = placement.surviving(alive, num_nodes=left.num_nodes)
        buf = make(left, remaining, renormalize=renormalize)
        batch = [t[alive] for t in whole_numbers(SIZE, 2)]
        batch[1][..., 0] = 0  # an expert with a replica, so that every token keeps some weight
        batch[1][..., 1:] = torch.tensor([3, 5])
        serve(left, buf, weights_of(comm, placement), batch, renormalized=renormalize)
        left.barrier()

    run(main, 2)


def test_recording(tmp_path):
    """A recording has the picks at the time of the call, times of the GPU, and traffic per call."""
    xs, ids, weights = random_world(SIZE, [5, 0, 9, 7], HIDDEN, EXPERTS, TOP_K, seed=1)

    def main(comm):
        r = comm.rank
        buf = moecomm.Buffer(
            comm, hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=9, num_sms=2, record=tmp_path
        )
        x, i, w = (t[r].to(comm.device, copy=True) for t in (xs, ids, weights))
        out = buf.dispatch(x, i, w, capacity=80)
        i.fill_(-1)  # after the call
        buf.combine(out.x, out.handle)
        recv, hook = buf.decode_dispatch(x, ids[r].to(comm.device), quant=None)
        hook()
        buf.decode_combine(recv.x, ids[r].to(comm.device), w, recv.handle, return_hook=False)
        stats = buf.stats()
        torch.cuda.synchronize()
        comm.barrier()
        buf.close()
        return stats

    stats = run(main, 2)
    for r, part in enumerate(record.load(tmp_path)):
        assert part.calls["op"].tolist() == [
            "dispatch",
            "combine",
            "decode_dispatch",
            "decode_receive",
            "decode_combine",
            "decode_sum",
        ]
        assert np.array_equal(part.ids[0], ids[r].numpy()) and np.array_equal(part.ids[1], ids[r].numpy())
        assert np.array_equal(part.weights[0], weights[r].numpy()) and np.array_equal(
            part.weights[1], weights[r].numpy()
        )
        assert (part.calls["end_ns"] >= part.calls["begin_ns"]).all() and (
            np.diff(part.calls["begin_ns"]) >= 0
        ).all()
        for hop in ("rail", "node"):
            for name, value in stats[r][hop].items():
                assert part.calls[f"{hop}_{name}"][:2].sum() == value, (hop, name)
                assert part.calls[f"{hop}_{name}"][2:].sum() == stats[r]["decode"][hop][name], (hop, name)
