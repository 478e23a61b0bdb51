# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Converts the hardware and mutations for a simulated run, and the lines of its log."""
from moecomm._native cimport simapi as world
from moecomm._native.shared.status cimport name_of_phase, phase_of

# In the order of world.LogKind and world.Mutant.
_DID = ("role", "wait", "put", "signal_rail", "signal_node", "landed", "give_up")
MUTANTS = (
    "none", "signal_before_put", "skip_wait", "early_wait", "late_wait", "less_signaled", "more_signaled",
    "drop_put", "skip_rank", "skip_signal", "one_half", "other_half", "any_word", "hidden_refusal",
    "absent_refusal", "no_rule_a", "no_rule_b", "no_rule_d", "wrong_epoch", "wrong_mode", "short_piece", "unset_board",
    "await_masked", "send_masked", "old_epoch",
)


cdef dict line_of(const world.LogLine& l):
    return {
        "begin": l.begin,
        "end": l.end,
        "did": _DID[<int>l.kind],
        "phase": name_of_phase(l.phase),
        "rank": l.rank,
        "channel": l.channel,
        "peer": l.peer,
        "role": (<bytes>l.role).decode(),
        "offset": l.offset,
        "value": l.value,
    }


cdef dict waiting_of(const world.RoleState& r):
    """Convert the state of a waiting role."""
    return {
        "role": (<bytes>r.name).decode(),
        "rank": r.rank,
        "channel": r.channel,
        "phase": name_of_phase(r.phase),
        "peer": r.peer,
        "at_least": r.at_least,
    }


cdef world.Mutation mutation_of(str mutant, str phase, bint chosen) except *:
    cdef world.Mutation m
    m.mutant = <world.Mutant><int>MUTANTS.index(mutant)
    m.phase = phase_of(phase)
    m.chosen = chosen
    return m


cdef int fill_hardware(world.Hardware* h, dict hardware) except -1:
    h.node_rate, h.node_latency = hardware["node_rate"], hardware["node_latency"]
    h.rail_rate, h.rail_latency = hardware["rail_rate"], hardware["rail_latency"]
    h.rail_message = hardware["rail_message"]
    h.sm_read, h.sm_write = hardware["sm_read"], hardware["sm_write"]
    h.put, h.poll, h.launch = hardware["put"], hardware["poll"], hardware["launch"]
    h.plan_token = hardware["plan_token"]
    return 0
