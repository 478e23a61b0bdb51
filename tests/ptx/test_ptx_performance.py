"""What the compiled kernels cost per role, against budgets: instructions, loads in a row, bytes in flight.

No clock is read: figures are counted, and the same in every run.
"""

import os

import emulated_gpu
import ptx_costs
import pytest
import torch
from ptx import mutants, performance
from ptx_machine import build

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(os.environ.get("EMULATED_KERNELS") != "ptx", reason="make ptx-check runs it"),
]


@pytest.fixture(scope="module")
def found():
    """{role: Costs}; kept as a table for `make ptx-check` to print."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        gpu = emulated_gpu.install(patch, ptx_costs.spread)
        mutants.declare(gpu.calls)
        costs = performance.measure(gpu, ptx_costs.WORLDS)
    build.COSTS.write_text(performance.table(costs) + "\nacquires while polling: none\n")
    return costs


def test_every_role_has_a_budget(found):
    assert set(found) == set(performance.BUDGETS)


@pytest.mark.parametrize("role", list(performance.BUDGETS))
def test_no_role_exceeds_its_budget(found, role):
    worse = found[role].exceeds(performance.BUDGETS[role])
    assert not worse, f"{role}: {worse}: {found[role]}, expected {performance.BUDGETS[role]}"


def test_who_polls_does_not_acquire():
    """An acquire empties the multiprocessor's cache."""
    assert performance.acquires_in_loops(build.compile_kernels()) == []
