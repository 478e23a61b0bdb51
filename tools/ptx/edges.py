"""The edges of docs/memory_model.md as instructions of the PTX: which mutants of each the checker finds.

An edge has a signal (or an arrival) and waits. They are found in the PTX by the source statements that nvcc has
inlined there; a mutant of an edge changes all of its signals, or all of its waits.
"""

import re
from dataclasses import dataclass

from . import mutants
from .places import Places


@dataclass(frozen=True)
class Edge:
    """`signal` and `wait`: patterns, each of which must be in a statement or a function that an instruction is part
    of."""

    name: str
    signal: tuple
    wait: tuple
    kernel: str = "kernels"


def _ranks(name, counter, kernel="kernels"):
    return Edge(name, (rf"signal_\w+\(.*{counter}",), (rf"wait_\w+\(.*{counter}",), kernel)


def _decode(name, flag, phase, near):
    signal = rf"signal_{'node' if near else 'rail'}\(.*{flag}_flag"
    return Edge(
        name,
        (signal,),
        (rf"wait_node\(at, at_least, Phase::{phase}", r"wait\(window\(" if near else r"wait\(rail\("),
        "decode",
    )


def _latch(name):
    return Edge(name, (rf"arrive\(g, Latch::{name}\)",), (rf"wait\(g, Latch::{name},",))


def _barrier(name, function, statement):
    return Edge(
        name,
        (rf"^{function}$", statement, r"fetch_add"),
        (rf"^{function}$", statement, r"reach\("),
        "decode",
    )


RANKS = (
    _ranks("`enter`", r"rail\.enter"),
    _ranks("`counts`", r"node\.counts"),
    _ranks("`rows` per (node, channel)", "rows_counter"),
    _ranks("`verdict`", r"rail\.verdict "),
    _ranks("`arrive`", r"node\.arrive"),
    _ranks("`ready`", r"node\.ready"),
    _ranks("`back` per (node, channel)", "back_counter"),
    _ranks("`done`", r"node\.done"),
)
DECODE = (
    _decode("`sent` in the owner's window", r"\bd\.sent", "arrive", True),
    _decode("`sent` in the owner's region", "remote_sent", "arrive", False),
    _decode("`answered` in the source's window", r"\bd\.answered", "sum", True),
    _decode("`answered` in the source's region", "remote_answered", "sum", False),
)
LATCHES = tuple(
    map(
        _latch,
        ("numbered", "totals", "shifted", "entered", "placed", "forwarded", "published", "reduced"),
    )
)
LEAVING = Edge("left", (r"^leave_call$", r"fetch_add"), (r"^leave_call$", r"load_acquire"))
BARRIERS = (
    _barrier("after listing", "send_group", "nothing moves"),
    _barrier("after sending", "send_group", r"wait\(g\)\);\s*$"),
    _barrier("after numbering", "receive_group", r"wait\(g\)\)"),
    _barrier("after answering", "answer_group", "no flag is sent"),
)
EDGES = (*RANKS, *DECODE, *LATCHES, LEAVING, *BARRIERS)


def side_of(edge, places, line):
    """Whether an instruction is an edge's "signal" or "wait", or None."""
    told = [*places.statements(line), *places.functions(line)]
    if any("reported_fault(" in t or "failed()" in t for t in told):  # such a word carries only itself
        return None
    for side in ("signal", "wait"):
        if all(any(re.search(p, t) for t in told) for p in getattr(edge, side)):
            return side
    return None


def found_by_edge(gpu, compiled, translate, edges=EDGES, seeds=3):
    """{edge name: {"signal": {change: finding or None}, "wait": ...}}; a change is what is left: "relaxed", "gpu"."""
    found = {}
    for name in sorted({e.kernel for e in edges}):
        places = Places(compiled[name][0].read_text())
        candidates = [
            m for m in mutants.all_of(translate(compiled[name][0]).read_text()) if " made " in m.what
        ]
        worlds = mutants.worlds_of(gpu, candidates)
        for edge in (e for e in edges if e.kernel == name):
            sides = found.setdefault(edge.name, {"signal": {}, "wait": {}})
            changes = {}
            for m in candidates:
                side = side_of(edge, places, m.line)
                if side:
                    changes.setdefault((side, m.what.rsplit(" ", 1)[1]), []).append(m)
            for (side, change), group in changes.items():
                useful = [w for w, ran in worlds.items() if any((m.kernel, m.row) in ran for m in group)]
                sides[side][change] = mutants.tried(gpu, group, useful, seeds, timeout=30.0)
    mutants.restore(gpu)
    return found


def told(sides):
    """A cell of docs/memory_model.md: which changes of the signal and of the wait are found."""
    parts = []
    for side in ("signal", "wait"):
        good = [c for c in ("relaxed", "acquire", "release", "plain", "gpu", "cta") if sides[side].get(c)]
        lost = [
            c
            for c in ("relaxed", "acquire", "release", "plain", "gpu", "cta")
            if c in sides[side] and not sides[side][c]
        ]
        if good:
            parts.append(f"{side} {', '.join(good)}")
        if lost:
            parts.append(f"**not** {side} {', '.join(lost)}")
    return "; ".join(parts) or "not reached"
