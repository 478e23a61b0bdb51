"""A rank's process is killed; the others get an error, shrink, and serve the next step with the remaining replicas."""

import json
import signal

import pytest
import replicated
from replicated import SIZE, TIMEOUT, batch


def run(processes, folder, *arguments, victim):
    """Return the observations of the survivors by rank."""
    ranks = [
        processes.Process(target=replicated.main, args=(str(folder), r, *arguments)) for r in range(SIZE)
    ]
    for p in ranks:
        p.start()
    try:
        for r, p in enumerate(ranks):
            p.join(60)
            expected = -signal.SIGKILL if r == victim else 0
            assert p.exitcode == expected, (
                f"rank {r} ended with {p.exitcode} (None: it hangs); expected {expected}"
            )
    finally:
        for p in ranks:
            p.kill()
            p.join()
    return {r: json.loads((folder / f"{r}.json").read_text()) for r in range(SIZE) if r != victim}


@pytest.mark.parametrize("mode", ["local", "even", "optimal"])
@pytest.mark.parametrize(
    "moment,victim,gone",
    [("between steps", 3, [7]), ("while forwarding", 1, [3, 4]), ("while migrating", 3, [7])],
)
def test_survivors_go_on_with_the_replicas_that_are_left(processes, tmp_path, mode, moment, victim, gone):
    for rank, seen in run(processes, tmp_path, 2, victim, mode, moment, victim=victim).items():
        error = seen["error"]
        assert (error["type"], error["peer"]) == ("PeerLost", victim), error
        assert seen["seconds"] < TIMEOUT, "told at once, not at the deadline"
        assert seen["recovered"] < TIMEOUT, (
            "the failed step again, by what is left, with a world and windows of its own"
        )
        lost = [
            float((shares * sum(ids == e for e in gone)).sum())
            for _, ids, shares in (batch(rank, n) for n in range(3, 7))
        ]
        assert seen["lost"] == lost and sum(lost) > 0, (
            "exactly the picks of experts that only the dead rank had"
        )
