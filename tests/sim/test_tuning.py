"""choose_plan is a pure function: its guarantees for any hardware and shape, and its numbers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecomm import tuning
from moecomm.tuning import (
    HARDWARE,
    Traffic,
    choose_plan,
    expected_parts,
    key_of,
    load_table,
    plan_for,
    save_table,
    traffic_per_token,
)


def sampled_parts(parts, num_experts, top_k, groups, top_groups, trials=4000):
    g = torch.Generator().manual_seed(parts + 7 * groups)
    total = 0
    for _ in range(trials):
        open_groups = torch.randperm(groups, generator=g)[:top_groups]
        experts = (
            open_groups[:, None] * (num_experts // groups) + torch.arange(num_experts // groups)
        ).flatten()
        picks = experts[torch.randperm(len(experts), generator=g)[:top_k]]
        total += len(set((picks // (num_experts // parts)).tolist()))
    return total / trials


@pytest.mark.parametrize(
    "parts,experts,top_k,groups,top_groups",
    [(8, 256, 8, 1, 1), (8, 256, 8, 8, 4), (4, 256, 8, 8, 4), (32, 256, 8, 8, 4), (2, 64, 6, 1, 1)],
)
def test_expected_parts_against_sampling(parts, experts, top_k, groups, top_groups):
    exact, seen = (
        expected_parts(parts, experts, top_k, groups, top_groups),
        sampled_parts(parts, experts, top_k, groups, top_groups),
    )
    assert abs(exact - seen) < 0.06, (exact, seen)


def test_expected_parts_by_enumeration():
    total = [len({e // 2 for e in picks}) for picks in itertools.combinations(range(8), 3)]
    assert abs(expected_parts(4, 8, 3) - sum(total) / len(total)) < 1e-12


def test_expected_parts_refuses():
    with pytest.raises(ValueError, match="expected 1 <= top_k"):
        expected_parts(4, 64, 33, 8, 4)
    with pytest.raises(ValueError, match="expected 1 <= top_k"):
        expected_parts(0, 64, 8)


TRAFFIC = dict(
    hidden=7168, num_experts=256, top_k=8, max_tokens=4096, row_bytes=14336, groups=8, top_groups=4
)


def test_traffic_of_one_node():
    rows = traffic_per_token(Traffic(ranks=8, ranks_per_node=8, **TRAFFIC))
    assert rows["rail"] == 0
    assert rows["written"] == pytest.approx(8)  # every pick ends as a row
    assert 3.5 < rows["node"] <= 4  # four groups, one per rank


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(HARDWARE)),
    nodes=st.sampled_from([1, 2, 3, 4, 8, 40]),
    per_node=st.sampled_from([1, 2, 3, 8]),
    hidden=st.integers(1, 1024).map(lambda n: 8 * n),
    top_k=st.integers(1, 12),
    tokens=st.integers(1, 8192),
    num_sms=st.sampled_from([None, 2, 8, 20, 64, 128]),
    shared=st.sampled_from([1, 2, 8]),
)
def test_every_plan_fits(name, nodes, per_node, hidden, top_k, tokens, num_sms, shared):
    hardware, ranks = HARDWARE[name], nodes * per_node
    traffic = Traffic(hidden, 16 * ranks, top_k, tokens, ranks, per_node, 2 * hidden, shared_gpu=shared)
    plan = choose_plan(hardware, traffic, num_sms)
    assert plan == choose_plan(hardware, traffic, num_sms)
    assert plan.num_sms % 2 == 0 and plan.num_sms >= 2
    if num_sms is None:
        assert plan.num_sms * shared <= hardware.sms or plan.num_sms == 2
    else:
        assert plan.num_sms == num_sms
    assert 1 <= plan.channels <= 1024
    assert plan.stages in (3, 4) and tuning.fits(hardware, plan.warps, plan.stage_bytes, plan.stages)
    assert plan.chunk_bytes >= traffic.row_bytes or nodes == 1
    assert plan.stage_bytes % 128 == 0 and plan.stage_bytes >= 1024
    workers = plan.num_sms * plan.warps - 1
    assert 0 <= plan.senders < workers
    assert (plan.senders == 0) == (nodes == 1)


def test_more_nodes_need_fewer_multiprocessors():
    """The rail is the bottleneck; with more nodes it needs fewer multiprocessors."""
    sms = [
        choose_plan(HARDWARE["NVIDIA H800"], Traffic(ranks=8 * n, ranks_per_node=8, **TRAFFIC)).num_sms
        for n in (1, 2, 4, 8)
    ]
    assert sms == sorted(sms, reverse=True), sms
    assert sms[1] <= 20 and sms[3] <= 12, sms


def test_rows_go_in_equal_pieces():
    plan = choose_plan(HARDWARE["NVIDIA H200"], Traffic(ranks=8, ranks_per_node=8, **TRAFFIC), 20)
    pieces = -(-14336 // plan.stage_bytes)
    assert pieces * plan.stage_bytes - 14336 < plan.stage_bytes / 4, plan


def test_a_fourth_stage_where_there_is_room():
    traffic = Traffic(ranks=8, ranks_per_node=8, **{**TRAFFIC, "hidden": 2048, "row_bytes": 4096})
    plan = choose_plan(HARDWARE["NVIDIA H200"], traffic, 20)
    assert plan.stages == 4 and not tuning.fits(
        HARDWARE["NVIDIA H200"], plan.warps, plan.stage_bytes + 128 * 3, plan.stages
    )
    assert choose_plan(HARDWARE["NVIDIA H200"], Traffic(ranks=8, ranks_per_node=8, **TRAFFIC), 20).stages == 3


def test_chunks_follow_the_rail():
    """A chunk is about a microsecond of the rail, or less for channels with few rows, and has whole rows."""
    hardware = HARDWARE["NVIDIA H200"]
    many = Traffic(ranks=16, ranks_per_node=8, **TRAFFIC)
    chunk = choose_plan(hardware, many, 4).chunk_bytes
    assert chunk % many.row_bytes == 0 and abs(chunk - 1e3 * hardware.rail_link) <= many.row_bytes / 2
    few = choose_plan(hardware, many, 64)
    rows = many.max_tokens * traffic_per_token(many)["rail"] / few.channels  # of a channel to the other node
    assert few.chunk_bytes < chunk and 1 <= few.chunk_bytes / many.row_bytes <= rows / 4
    faster = tuning.replace(hardware, rail_link=100.0)
    assert choose_plan(faster, many, 4).chunk_bytes > chunk


def test_tables_of_before_stages_and_chunks_were_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    (tmp_path / "Old.json").write_text(
        '{"k": {"num_sms": 4, "warps": 8, "channels": 9, "senders": 0, "stage_bytes": 4096}}'
    )
    assert load_table("Old") == {"k": tuning.Plan(4, 8, 9, 0, 4096, 3, 1 << 18)}


def test_table_overrides(tmp_path):
    hardware, traffic = HARDWARE["NVIDIA H200"], Traffic(ranks=8, ranks_per_node=8, **TRAFFIC)
    chosen = choose_plan(hardware, traffic, 20)
    measured = tuning.Plan(20, 8, 96, 0, 4096, 4, 14336 * 3)
    assert plan_for(hardware, traffic, 20, table={}) == chosen
    assert plan_for(hardware, traffic, 20, table={key_of(traffic, 20): measured}) == measured
    path = save_table(hardware.name, {key_of(traffic, 20): measured}, tmp_path)
    assert path.name == "NVIDIA_H200.json"
    monkey = tuning.TABLES
    tuning.TABLES = tmp_path
    try:
        assert load_table(hardware.name) == {key_of(traffic, 20): measured}
        assert plan_for(hardware, traffic, 20) == measured
        assert load_table("another GPU") == {}
    finally:
        tuning.TABLES = monkey


def test_unknown_gpu():
    hardware = tuning.hardware_of("NVIDIA Something", 60, 100000)
    assert hardware.sms == 60 and hardware.shared_bytes == 100000
    assert choose_plan(hardware, Traffic(ranks=2, ranks_per_node=2, **TRAFFIC)).num_sms >= 2
