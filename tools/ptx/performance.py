"""What the compiled kernels cost, as far as a machine without a clock can tell: per role, instructions, loads in a row,
and bytes in flight.

Each figure is what one more token of every rank costs a rank: two runs with different numbers of tokens are
compared, so what a call costs by itself drops out. Waiting for others is not counted. Budgets are what a change
may not exceed.
"""

import ctypes
import re
from dataclasses import dataclass

from . import build, mutants
from .places import Places

# The outermost function of this list that an instruction is part of is its role.
ROLES = {
    "kernels": (
        "number_from_zero", "shift_channel", "send", "forward", "arrive", "reduce", "sum",
    ),
    "decode": (
        "decode_list", "decode_send", "decode_number", "decode_shift_places", "decode_pack", "decode_answer",
        "decode_sum", "take_weights",
    ),
}  # fmt: skip
WAITING = re.compile(
    r"\bwait\((window|rail)\(|\breach\(|f\.wait_(node|rail)\(|latches\.wait\(|barrier\.wait\("
)
WARPS = 12  # of a multiprocessor


@dataclass(frozen=True)
class Costs:
    """Of one role, per token of a rank."""

    instructions: float  # of a warp
    far: float  # latencies of peers' memory that nothing hides: loads that follow each other
    near: float  # of this rank's GPU
    in_flight: float  # KB that a multiprocessor's warps have asked peers for, while they wait

    def exceeds(self, budget):
        """Names of what is more than the budget allows, or fewer bytes in flight."""
        worse = [n for n in ("instructions", "far", "near") if getattr(self, n) > getattr(budget, n) + 0.05]
        return worse + ["in_flight"] * (self.in_flight < budget.in_flight - 0.5)


# What a change may not exceed, nor stay below in flight. Where it improves a figure, its budget goes down with it.
BUDGETS = {
    "number_from_zero": Costs(660, 0, 65, 0),
    "shift_channel": Costs(8, 0, 1, 0),
    "send": Costs(810, 2.2, 28, 0),
    "forward": Costs(1780, 0, 77, 0),
    "arrive": Costs(185, 0, 0, 0),
    "reduce": Costs(31600, 41, 71, 9),
    "sum": Costs(15100, 22, 41, 13),
    "decode_list": Costs(1200, 0, 50, 0),
    "decode_send": Costs(2200, 3.5, 50, 0),
    "decode_number": Costs(710, 0, 86, 0),
    "decode_shift_places": Costs(650, 0, 72, 0),
    "decode_pack": Costs(3800, 4, 118, 84),
    "decode_answer": Costs(38600, 7.5, 213, 0),
    "decode_sum": Costs(32700, 27, 68, 10),
    "take_weights": Costs(15, 0, 1, 0),
}


def role_of(places, line, roles):
    """The role of an instruction, None: it waits, or is part of none."""
    if any(WAITING.search(s) for s in places.statements(line)):
        return None
    return next((f for f in reversed(places.functions(line)) if f in roles), None)


def acquires_in_loops(compiled):
    """PTX lines of acquires that are made again and again while a word is waited for."""
    found = []
    for name in ROLES:
        text = compiled[name][0].read_text()
        places = Places(text)
        for number, line in enumerate(text.split("\n"), 1):
            if re.match(r"\s*ld\.acquire", line) and any(
                "for (" in s and "polls" in s for s in places.statements(number)
            ):
                found.append(f"{name}.ptx line {number}")
    return found


def count(gpu, name, places, rows, main, size, per_node):
    """{role: [instructions, far, near, bytes from peers]} of one run, over all ranks."""
    import moecomm

    mutants.restore(gpu)
    gpu.calls.ptx_count_costs(True)
    try:
        moecomm.run_local(main, size, ranks_per_node=per_node, device="cuda:0", timeout=120.0)
    finally:
        gpu.calls.ptx_count_costs(False)
    costs = (ctypes.c_uint64 * (5 * len(rows)))()
    gpu.calls.ptx_costs.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    gpu.calls.ptx_costs.restype = ctypes.c_int64
    assert gpu.calls.ptx_costs(_entry(name), costs, len(rows)) == len(rows)
    found = {role: [0, 0, 0, 0] for role in ROLES[name]}
    for number, (op, line) in enumerate(rows):
        runs, far, near, from_peers, _ = costs[5 * number : 5 * number + 5]
        if runs and (role := role_of(places, line, ROLES[name])):
            polls = op == "mbarrier.try_wait" or "barrier_wait" in places.functions(line)
            for k, n in enumerate((0 if polls else runs, far, near, from_peers)):
                found[role][k] += n
    return found


def _entry(name):
    text = build.compile_kernels()[name][0].read_text()
    return re.search(r"\.entry\s+([\w$]+)", text)[1].encode()


def _rows(machine_text):
    """(operation, PTX line) of every row of a program."""
    words = (line.split() for line in machine_text.splitlines())
    return [(w[0], int(w[12])) for w in words if w[0] not in ("machine", "file", "constant", "function")]


def measure(gpu, worlds):
    """{role: Costs}. `worlds`: {program: (world(tokens) -> main, size, ranks per node, fewer tokens, more)}."""
    found = {}
    for name, (world, size, per_node, fewer, more) in worlds.items():
        ptx = build.compile_kernels()[name][0]
        places, rows = Places(ptx.read_text()), _rows(build.translate(ptx).read_text())
        less = count(gpu, name, places, rows, world(fewer), size, per_node)
        all_ = count(gpu, name, places, rows, world(more), size, per_node)
        tokens = (more - fewer) * size
        for role in ROLES[name]:
            instructions, far, near, from_peers = (b - a for a, b in zip(less[role], all_[role]))
            found[role] = Costs(
                instructions / tokens,
                far / tokens,
                near / tokens,
                from_peers / far * WARPS / 1024 if far else 0.0,
            )
    return found


def table(found):
    """The figures, with their budgets in parentheses."""
    lines = [
        "per token of a rank     instructions       peers' latencies   own latencies      KB of peers in flight per SM"
    ]
    for role, c in found.items():
        b = BUDGETS[role]
        lines.append(
            f"{role:20}"
            + "".join(
                f"{getattr(c, n):10.1f} {f'({getattr(b, n):g})':8}"
                for n in ("instructions", "far", "near", "in_flight")
            )
        )
    return "\n".join(lines)
