"""Mutants of the PTX: one instruction each that orders less than it did, or waits for less, or counts wrong.

Each must be found by the machine's checks, or by a wrong result, when a small world of ranks runs under it.
"""

import ctypes
from dataclasses import dataclass

from .parser import parse

ORDER, SCOPE = 1, 2  # columns of a row of the machine's text
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
    if op in ("fence.proxy", "fence.proxy.shared", "fence"):
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

SMALL = (
    "ptx.cuh",
    "warp.cuh",
    "group.hpp",
    "squad.cuh",
    "intrinsics.hpp",
)  # what is inlined everywhere tells nothing


def caller(lines, files, line):
    """The place in the sources that an instruction comes from, as far as its neighbours say."""
    for at in range(line - 1, max(0, line - 400), -1):
        words = lines[at].split()
        if words[:1] == [".loc"] and not files.get(int(words[1]), "").endswith(SMALL) and int(words[2]):
            return f"{files.get(int(words[1]), '?').rsplit('/', 1)[-1]}:{words[2]}"
    return "?"


def reached(calls, function, rows):
    """Which rows have run."""
    marks = ctypes.create_string_buffer(rows)
    assert calls.ptx_reached(function.encode(), marks, rows) >= 0
    return marks.raw


def apply(calls, mutants):
    """The program as it was, but for these."""
    calls.ptx_restore()
    for m in mutants:
        calls.ptx_mutate(m.kernel.encode(), m.row, m.drop, m.order, m.scope, m.integer)


def tried(gpu, mutants, worlds, seeds):
    """What is found with these mutants in place, or None."""
    import ptx_worlds

    for seed in range(seeds):
        for world in worlds:
            apply(gpu.calls, mutants)
            found = ptx_worlds.run(world, seed, gpu, timeout=2.0)
            if found:
                return found
    return None


def run(seeds=3, only=None, single=False):
    """Try mutants in the small worlds and print what was found; returns what was not.

    A mutant is a line of the sources: all instructions that nvcc has made of it, wherever it was inlined,
    since another copy may do what one leaves out. single: every instruction by itself.
    """
    import ptx_worlds

    from ptx import build

    missed, counts = [], {}
    with ptx_worlds.installed() as gpu:
        calls = gpu.calls
        calls.ptx_mutate.argtypes = [
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        calls.ptx_reached.argtypes, calls.ptx_reached.restype = (
            [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64],
            ctypes.c_int64,
        )
        for name, (ptx, _) in build.compile_kernels().items():
            if name == "quant":  # its blocks have nothing to say to each other
                continue
            text = ptx.read_text()
            lines, files = text.split("\n"), parse(text).files
            mutants = all_of(build.translate(ptx).read_text())
            rows = max(m.row for m in mutants) + 1
            worlds = {}
            for world in ptx_worlds.WORLDS:
                calls.ptx_restore()
                wrong = ptx_worlds.run(world, 1, gpu)
                assert wrong is None, f"without a mutant: {wrong}"
                worlds[world] = reached(calls, mutants[0].kernel, rows)
            groups, everywhere = {}, {}
            for m in mutants:
                if only is None or only in m.what:
                    groups.setdefault((m.what, m.row if single else caller(lines, files, m.line)), []).append(
                        m
                    )
            for (what, _place), group in groups.items():
                useful = [w for w, marks in worlds.items() if any(marks[m.row] for m in group)]
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
                missed.append(group)
                print(
                    f"not found{' alone' if everywhere[what] else ''}: {what}, "
                    f"{caller(lines, files, group[0].line)}, {len(group)} instructions, "
                    f"the first of them {name}.ptx line {group[0].line}",
                    flush=True,
                )
            calls.ptx_restore()
    print(
        f"\n{'mutant':50} {'sites':>6} {'found':>6} {'found if all of the kind are dropped':>37} {'not reached':>12}"
    )
    for what, (of, found, together, never) in sorted(counts.items()):
        print(f"{what:50} {of:6} {found:6} {together:37} {never:12}")
    return missed
