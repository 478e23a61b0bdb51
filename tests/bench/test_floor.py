"""The floor of a case, the caches, and the baselines from another run."""

import pytest
import torch
from bench_records import a_record, small
from worlds import random_world

from bench import caches, report, rivals
from bench.bare import Bare


def test_merged_baselines_keep_the_ratios_of_their_run():
    first, second = a_record(op="dispatch"), a_record(op="dispatch")
    second["baselines"] = {"tuned-impi": 900.0}
    second["baselines_wrong"], second["ratios"] = {"tuned-impi": 3}, {"tuned-impi": 0.9}
    second["best_baseline"] = {"name": "tuned-impi", "time_us": 900.0, "ratio": 0.9}
    first["cold"] = {key: first[key] for key in report.COLD_KEYS}
    second["cold"] = {key: second[key] for key in report.COLD_KEYS}
    report.merge([first], [second])
    assert list(first["baselines"]) == ["tuned-mpi", "tuned-gloo", "torch-gloo", "tuned-impi"]
    assert first["best_baseline"] == first["cold"]["best_baseline"] == second["best_baseline"]
    assert first["baselines_wrong"]["tuned-impi"] == 3 and first["cold"]["ratios"]["tuned-impi"] == 0.9
    assert "cold: 0.90 x tuned-impi (best baseline), 50% of the floor" in report.headline(first)
    report.merge([first], [a_record(op="dispatch")])
    assert first["best_baseline"]["name"] == "tuned-impi", "a slower baseline changes nothing"


def test_rivals_say_why_they_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "HOME", tmp_path)
    assert "make rivals" in rivals.why_not()


# -- the floor ---------------------------------------------------------------------------------------


class OneRank:
    """The part of a world that the bare loop uses."""

    def __init__(self, rank):
        self.rank = rank


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_the_bare_loop_moves_what_the_case_moves(layout):
    case = small(layout=layout)
    _, ids, weights = random_world(4, [9, 0, 4, 7], 16, 16, 4, seed=7)
    for rank in range(4):
        loop, node = Bare(OneRank(rank), case), rank // 2
        loop.prepare(ids, weights)
        placed = sent = arrived = 0
        for source in (rank % 2, rank % 2 + 2):
            for token in ids[source].tolist():
                owners = [e // 4 for e in token if e >= 0]
                here = [o for o in owners if o // 2 == node]
                placed += len(here) if layout == "expert" else len(set(here))
                arrived += bool(here) and source != rank
                sent += source == rank and any(o // 2 != node for o in owners)
        assert (loop.placed_rows, loop.sent_rows, loop.arrived_rows) == (placed, sent, arrived)


def test_the_bare_loop_of_one_node_gives_its_sums():
    case = small(nodes=1, ranks_per_node=4, dtype="f32")
    xs, ids, weights = random_world(4, [9, 3, 4, 7], 16, 16, 4, torch.float32, seed=7)
    loop = Bare(OneRank(0), case)
    loop.prepare(ids, weights)
    loop.poison(float("nan"))
    loop.dispatch(xs[0])
    loop.combine()
    times = torch.tensor([len({e // 4 for e in token if e >= 0}) for token in ids[0].tolist()])
    torch.testing.assert_close(loop._memory["y"][:9], xs[0] * times[:, None])


def test_last_level_caches_are_counted_once(tmp_path):
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [(1, "Instruction", "32K", cpu), (1, "Data", "48K", cpu), (3, "Unified", "16M", f"{cpu // 2}")]
        ):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, text in zip(("level", "type", "size", "shared_cpu_list"), (level, kind, size, shared)):
                (folder / name).write_text(f"{text}\n")
    assert caches.last_level_bytes(tmp_path) == 32 << 20
    assert caches.last_level_bytes(tmp_path / "nothing") == 0
