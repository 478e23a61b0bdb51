"""Migration and shrink on processes: shared memory inside a node, UCX between nodes."""

import migrating as suite
import pytest
from worlds import assert_same

import moecomm

pytestmark = pytest.mark.mpi(min_size=4)


@pytest.mark.parametrize("per_node", [2, 4])
def test_layers_run_while_weights_move_and_after_a_rank_has_left(world, per_node):
    if world.size != 4:
        pytest.skip(f"written for 4 ranks; this world has {world.size}")
    weights, xs, ids = suite.model()
    old, new = suite.placements()
    r = world.rank
    expected = suite.dense(weights, xs[r], ids[r])
    with moecomm.Communicator(world, ranks_per_node=per_node, timeout=20.0) as comm:
        buf, local = suite.make_buffer(comm, old), suite.local_weights(weights, old, r)
        pending = new.migrate(local, comm)
        for _ in range(3):
            assert_same(suite.forward(buf, local, xs[r], ids[r]), expected, "during")
        moved = pending.wait()
        buf.use(new)
        assert_same(suite.forward(buf, moved, xs[r], ids[r]), expected, "after")
        comm.barrier()
        if r < 3:
            left = comm.shrink([0, 1, 2])
            survivors = suite.make_buffer(left, new.surviving([0, 1, 2], num_nodes=left.num_nodes))
            out = survivors.dispatch(xs[r], ids[r][0].contiguous())
            gone = survivors.backend.router.placement.replica_count[0] == 0
            assert_same(out.lost_weight, gone[ids[r][0]].sum(1).float(), "lost weight")
            left.barrier()
            survivors.close()
            left.close()
        comm.barrier()
        buf.close()
