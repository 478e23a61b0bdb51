"""The drop-in for deep_ep over an mpi4py communicator: Buffer(group=None, comm=...), and the other interfaces."""

import deep_ep_elastic
import deep_ep_oracle
import pytest

from moecomm.integrations import deep_ep


@pytest.fixture
def nodes():
    """Two nodes, if there are enough ranks."""
    from mpi4py import MPI

    count = 2 if MPI.COMM_WORLD.size % 2 == 0 else 1
    deep_ep.configure(ranks_per_node=MPI.COMM_WORLD.size // count)
    yield count
    deep_ep.configure(ranks_per_node=None)
    deep_ep.shutdown()


@pytest.mark.mpi(min_size=2)
def test_deep_ep(nodes):
    """Normal mode and ElasticBuffer equal the contract."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    buffer = deep_ep.Buffer(None, comm=comm)
    assert (
        buffer.group is comm
        and (buffer.rank, buffer.group_size) == (comm.rank, comm.size)
        and buffer.runtime.get_num_rdma_ranks() == nodes
    )
    deep_ep_oracle.check_without_ids(buffer, comm.rank, comm.size)
    deep_ep_elastic.check(comm, comm.rank, comm.size, nodes)
