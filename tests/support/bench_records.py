"""Fast cases, and records with made-up numbers, for the tests of the benchmark."""

from dataclasses import replace

from bench import cases, report
from bench.measure import OPS, Measured


def small(**changes):
    """Make a small, fast case."""
    return replace(cases.Case(nodes=2, ranks_per_node=2, tokens=9, hidden=16, experts=16, top_k=4), **changes)


def a_record(**changes):
    """Make a record with made-up numbers."""
    hop = dict(logical_rows=1, physical_rows=1, logical_bytes=10, physical_bytes=5)
    times = {
        name: {op: [1e-3, 2e-3, 3e-3] for op in OPS}
        for name in ("moecomm", "tuned-mpi", "tuned-gloo", "torch-gloo")
    }
    measured = Measured(
        times=times,
        wrong={n: dict.fromkeys(OPS, 0) for n in times},
        plan=[1e-4],
        hops={op: {"rail": hop, "node": hop} for op in OPS},
        floor=dict.fromkeys(OPS, 1e-3),
    )
    return report.record(small(**changes), measured)
