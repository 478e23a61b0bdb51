"""The drop-in for deep_ep in the cuda world, on an emulated GPU: results are the same."""

import deep_ep_elastic
import deep_ep_hybrid
import deep_ep_oracle
import pytest
from emulated_gpu import emulated  # noqa: F401 - a fixture

import moecomm

CHECKS = {
    "normal": lambda comm, nodes: deep_ep_oracle.check_normal(comm, comm.rank, comm.size, nodes),
    "low latency": lambda comm, nodes: deep_ep_oracle.check_low_latency(comm, comm.rank, comm.size),
    "elastic": lambda comm, nodes: deep_ep_elastic.check(comm, comm.rank, comm.size, nodes),
    "hybrid": lambda comm, nodes: deep_ep_hybrid.check(comm, comm.rank, comm.size, nodes),
}


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("check", CHECKS)
def test_emulated_gpu(emulated, check, nodes):  # noqa: F811 - the fixture
    """All verbs of the interface, on one node and on two."""
    moecomm.run_local(
        lambda comm: CHECKS[check](comm, nodes), 2, ranks_per_node=2 // nodes, device="cuda:0", timeout=100.0
    )
