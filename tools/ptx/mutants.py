"""Mutants of the PTX: one instruction each that orders less than it did, or waits for less, or counts wrong.

Each must be found by the machine's checks, or by a wrong result, when a small world of ranks runs under it.
"""

import ctypes
from dataclasses import dataclass

from .places import Places

ORDER, SCOPE = 1, 2  # columns of a row of the machine's text
EXPLAINED = "st.global.1.u64 release.sys"  # to the host, which the checker does not see
ACQUIRE, RELEASE, ACQ_REL = "2", "3", "4"
SCOPES = {"1": "cta", "2": "gpu", "3": "sys"}


@dataclass(frozen=True)
class Mutant:
    kernel: str  # part of the machine's function
    row: int  # of the program
    line: int  # of the PTX
    what: str
    drop: bool = False
    order: int = -1  # -1: as it is
    scope: int = -1
    integer: int = 0  # added


def of_row(kernel, number, row):
    """Mutants of one row of the machine's text."""
    op, order, scope, line = row[0], row[ORDER], row[SCOPE], int(row[12])
    make = lambda what, **change: Mutant(kernel, number, line, what, **change)  # noqa: E731
    if op in ("fence.proxy", "fence.proxy.shared", "fence.proxy.both", "fence"):
        yield make(f"{op} dropped", drop=True)
    if op == "bar.warp":
        yield make("bar.warp.sync dropped", drop=True)
    if op in ("bulk.wait", "bulk.wait_read"):
        yield make(f"{op} dropped", drop=True)
    if op == "mbarrier.expect_tx":
        yield make("expect_tx of 16 bytes more", integer=16)
        yield make("expect_tx of 16 bytes less", integer=-16)
    if op == "mbarrier.try_wait":
        yield make("mbarrier wait dropped", drop=True)
    if op.startswith(("ld.", "st.", "red.", "atom.")) and order in (ACQUIRE, RELEASE, ACQ_REL):
        name = {ACQUIRE: "acquire", RELEASE: "release", ACQ_REL: "acq_rel"}[order]
        yield make(
            f"{op} {name}.{SCOPES[scope]} made {'relaxed' if op[0] in 'ra' else 'plain'}",
            order=1 if op[0] in "ra" else 0,
        )
        if op[0] == "l":
            yield make(f"{op} {name}.{SCOPES[scope]} made relaxed", order=1)
        if order == ACQ_REL:
            yield make(f"{op} acq_rel.{SCOPES[scope]} made acquire", order=2)
            yield make(f"{op} acq_rel.{SCOPES[scope]} made release", order=3)
        for weaker in range(1, int(scope)):
            yield make(f"{op} {name}.{SCOPES[scope]} made {SCOPES[str(weaker)]}", scope=weaker)


def all_of(machine_text):
    """Mutants of a program."""
    functions, rows, found = [], [], []
    for line in machine_text.splitlines():
        words = line.split()
        if words[0] == "function":
            functions.append((words[1], int(words[3]), int(words[4])))
        elif words[0] not in ("machine", "file", "constant"):
            rows.append(words)
    for name, begin, end in functions:
        for number in range(begin, end):
            found.extend(of_row(name, number, rows[number]))
    return found


# -- the run -------------------------------------------------------------------------------------------------


def declare(calls):
    """Types of the machine's functions for mutants."""
    text, number, wide = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
    calls.ptx_mutate.argtypes = [text, number, number, number, number, wide]
    calls.ptx_reached.argtypes, calls.ptx_reached.restype = [text, text, wide], wide


def reached(calls, function, rows):
    """Which rows have run."""
    marks = ctypes.create_string_buffer(rows)
    assert calls.ptx_reached(function.encode(), marks, rows) >= 0
    return marks.raw


def worlds_of(gpu, mutants):
    """{small world: the (function, row) of the mutants that it runs}; without a mutant nothing is found."""
    import ptx_worlds

    rows, found = {}, {}
    for m in mutants:
        rows[m.kernel] = max(rows.get(m.kernel, 0), m.row + 1)
    for world in ptx_worlds.WORLDS:
        restore(gpu)
        wrong = ptx_worlds.run(world, 1, gpu)
        assert wrong is None, f"without a mutant: {wrong}"
        marks = {function: reached(gpu.calls, function, count) for function, count in rows.items()}
        found[world] = {(m.kernel, m.row) for m in mutants if marks[m.kernel][m.row]}
    return found


def restore(gpu):
    """All programs as they were."""
    gpu.calls.ptx_restore()


def apply(calls, mutants):
    """The program as it was, but for these."""
    calls.ptx_restore()
    for m in mutants:
        calls.ptx_mutate(m.kernel.encode(), m.row, m.drop, m.order, m.scope, m.integer)


def tried(gpu, mutants, worlds, seeds, timeout=2.0):
    """What is found with these mutants in place, or None."""
    import ptx_worlds

    for seed in range(seeds):
        for world in worlds:
            apply(gpu.calls, mutants)
            found = ptx_worlds.run(world, seed, gpu, timeout)
            if found:
                return found
    return None


def run(seeds=3, only=None, single=False):
    """Try mutants in the small worlds and print what was found; returns the kinds that never are, and should be.

    A mutant is a line of the sources: all instructions that nvcc has made of it, wherever it was inlined,
    since another copy may do what one leaves out. single: every instruction by itself.
    """
    import ptx_worlds

    from ptx import build

    counts = {}
    with ptx_worlds.installed() as gpu:
        declare(gpu.calls)
        for name, (ptx, _) in build.compile_kernels().items():
            # The blocks of quant have nothing to say to each other; no world here runs a Domain's kernels.
            if name in ("quant", "domain"):
                continue
            places = Places(ptx.read_text())
            mutants = all_of(build.translate(ptx).read_text())
            worlds = worlds_of(gpu, mutants)
            groups, everywhere = {}, {}
            for m in mutants:
                if only is None or only in m.what:
                    groups.setdefault((m.what, m.row if single else places.caller(m.line)), []).append(m)
            for (what, _place), group in groups.items():
                useful = [w for w, ran in worlds.items() if any((m.kernel, m.row) in ran for m in group)]
                if not useful:
                    counts.setdefault(what, [0, 0, 0, 0])[3] += 1
                    continue
                kind = counts.setdefault(what, [0, 0, 0, 0])
                kind[0] += 1
                if tried(gpu, group, useful, seeds):
                    kind[1] += 1
                    continue
                if what not in everywhere:  # another one may do what this one leaves out
                    everywhere[what] = tried(gpu, [m for m in mutants if m.what == what], list(worlds), seeds)
                kind[2] += bool(everywhere[what])
                print(
                    f"not found{' alone' if everywhere[what] else ''}: {what}, "
                    f"{places.caller(group[0].line)}, {len(group)} instructions, "
                    f"the first of them {name}.ptx line {group[0].line}",
                    flush=True,
                )
            restore(gpu)
    print(
        f"\n{'mutant':50} {'sites':>6} {'found':>6} {'found if all of the kind are dropped':>37} {'not reached':>12}"
    )
    lost = [
        what
        for what, (of, found, together, _) in counts.items()
        if of and not found + together and not what.startswith(EXPLAINED)
    ]
    for what, (of, found, together, never) in sorted(counts.items()):
        print(f"{what:50} {of:6} {found:6} {together:37} {never:12}")
    if lost:
        print(f"\nnot found at all, and not explained in docs/memory_model.md: {', '.join(sorted(lost))}")
    return lost
