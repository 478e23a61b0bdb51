"""The column "found by" of docs/memory_model.md: each edge between ranks, groups and slices, left out of the compiled
kernels in several ways, is found by the checker in small worlds.
"""

import os
from pathlib import Path

import emulated_gpu
import ptx_worlds
import pytest
from ptx import edges, mutants
from ptx_machine import build

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(os.environ.get("EMULATED_KERNELS") != "ptx", reason="make ptx-check runs it"),
]
PAGE = Path(__file__).resolve().parents[2] / "docs/memory_model.md"
NAMED = ("signal", "flag", "latch", "barrier")  # the columns that name an edge


def told_by_the_page():
    """{name of an edge: its cell in the column "found by"}."""
    found, name, last = {}, None, None
    for line in PAGE.read_text().split("\n"):
        cells = [c.strip() for c in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[-1] == "found by" and set(cells) & set(NAMED):
            name, last = next(i for i, c in enumerate(cells) if c in NAMED), len(cells) - 1
        elif not cells:
            name = None
        elif name is not None and not cells[0].startswith("---"):
            found[cells[name]] = cells[last]
    return found


@pytest.fixture(scope="module")
def findings():
    """What is found of every edge's mutants."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = emulated_gpu.install(patch, ptx_worlds.spread)
        mutants.declare(gpu.calls)
        return edges.found_by_edge(gpu, build.compile_kernels(), build.translate)


def test_the_page_names_every_edge():
    assert set(told_by_the_page()) == {e.name for e in edges.EDGES}


@pytest.mark.parametrize("name", [e.name for e in edges.EDGES])
def test_what_is_found(findings, name):
    assert edges.told(findings[name]) == told_by_the_page()[name]
