"""Random schedules: exploration finds all known mutants and nothing else, and shrinks its findings."""

import pytest

from moecomm import explore


def test_exploration_finds_nothing():
    """A small share of `make explore`."""
    for seed in range(1000, 1060):
        found = explore.explore_world(explore.random_world(seed, "choice" if seed % 6 == 0 else None), 100)
        assert not found["found"], explore.report(found)


def test_refused_call_is_over_for_every_gateway():
    """A program that once failed.

    A gateway with space forwarded rows of a refused call to a rank that had already left the call.
    """
    found = explore.explore_world(explore.random_world(102397, "dispatch"), 1000)
    assert not found["found"], explore.report(found)


def test_refused_choice_leaves_no_put_behind():
    """A program that fails if a refused exchange does not wait for its puts.

    The next call's announcement arrives first, and is taken for the current one.
    """
    found = explore.explore_world(explore.random_world(500201, "choice"), 1000)
    assert not found["found"], explore.report(found)


@pytest.mark.parametrize("name,mutant,phase,kind", explore.MUTATIONS, ids=[m[0] for m in explore.MUTATIONS])
def test_exploration_finds(name, mutant, phase, kind):
    """Every known bug is found, and its report names the schedule."""
    schedules, found = explore.find_mutation(mutant, phase, kind)
    assert found is not None, f"{name}: not found in {schedules} schedules"
    print(f"{name}: found in schedule {schedules}: {found['what']}")
    text = explore.report(found)
    assert f"schedule seed {found['seed']}" in text and "world:" in text
    if found["what"] == "deadlock":
        assert "waits for rank" in text, text


@pytest.mark.parametrize(
    "name",
    [
        "missing signal",
        "count off by one: forward waits for one row more",
        "decode: missing signal",
        "decode: missing acquire: answers",
        "window reused too early: experts' rows",
        "decode: missing put",
    ],
)
def test_a_finding_is_shrunk(name):
    """The result is a smaller world with a shorter trace.

    It fails again from the seed, the trace and the waits in the report.
    """
    _, mutant, phase, kind = next(m for m in explore.MUTATIONS if m[0] == name)
    _, found = explore.find_mutation(mutant, phase, kind)
    small = explore.shrink(found, mutant=mutant, phase=phase)
    assert 0 < len(small["log"]) < len(found["log"]), "this mutant's first finding is not the shortest"
    was, now = found["world"], small["world"]
    assert (
        now != was
        and all(
            getattr(now, f) <= getattr(was, f)
            for f in ("nodes", "ranks_per_node", "channels", "tokens", "rounds")
        )
        and now.seed == was.seed
    )
    again = explore.explore_world(now, 1, first_seed=small["seed"], mutant=mutant, phase=phase, oracle=False)
    assert again["found"] and {**again, "schedules": 0} == {**small, "schedules": 0}, (
        "the schedule of that seed is another one"
    )
    assert not explore.explore_world(now, 50, first_seed=small["seed"])["found"], (
        "it fails without the mutant, too"
    )
    lines = explore.report(small).splitlines()
    assert (
        small["what"] in lines[0]
        and f"schedule seed {small['seed']}, {small['perturbations']} perturbation(s)" in lines[0]
    )
    assert lines[1] == f"  world: {now}" and f"program seed {now.seed}" in lines[1]
    waiting = [line for line in lines if "waits for rank" in line]
    assert len(waiting) == len(small["stuck"]) and (len(waiting) > 0) == (small["what"] == "deadlock")
    for line, role in zip(waiting, small["stuck"]):
        assert (
            line.startswith(f"  rank {role['rank']} {role['role']}")
            and f"waits for rank {role['peer']} in phase {role['phase']}" in line
        )
        assert 0 <= role["peer"] < now.size
    steps = [line for line in small["log"] if line["did"] != "landed"]
    trace_of_it = lines[lines.index(f"  the last of {len(steps)} steps (us):") + 1 :]
    assert len(trace_of_it) == min(40, len(steps))
    for line, step in zip(trace_of_it, steps[-40:]):
        assert f"{step['begin'] / 1e6:.3f} .. " in line and f"rank {step['rank']} {step['role']}" in line


def test_a_crash_is_no_short_trace(monkeypatch):
    """A smaller world that crashes its process gives no trace: the finding keeps the larger world."""
    _, found = explore.find_mutation("skip_signal", "none", "dispatch")
    monkeypatch.setattr(explore, "_in_child", lambda explore: None)
    assert explore.explore_world(found["world"], 1, mutant="skip_signal")["what"] == "crash"
    assert explore.shrink(found, mutant="skip_signal") is found
