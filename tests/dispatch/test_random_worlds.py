"""Random worlds on rank threads, drawn by hypothesis, against the oracle bit for bit."""

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, Case, check_case, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import assert_same

import moecomm

cases = st.composite(lambda draw: make_case(lambda options: draw(st.sampled_from(options))))()


def run(case, **options):
    """Run the case on rank threads; return the bits of the results by rank."""
    return moecomm.run_local(
        lambda comm: check_case(comm, case, **options), case.size, ranks_per_node=case.ranks_per_node
    )


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases)
def test_random_worlds(case):
    run(case)


BASE = Case(ranks_per_node=2, tokens=[5, 0, 17, 8])
EDGES = {
    "every rank is empty": replace(BASE, tokens=[0, 0, 0, 0]),
    "one rank has tokens": replace(BASE, tokens=[0, 0, 9, 0]),
    "no token picks an expert": replace(BASE, routing="masked", alignment=4, capacity="spare"),
    "all tokens to one expert": replace(BASE, routing="one_expert", alignment=8),
    "all tokens to one rank": replace(BASE, routing="one_rank", experts_per_rank=9, top_k=9),
    "the smallest row": replace(BASE, hidden=2, dtype=torch.float64),
    "32 picks of 32 experts": replace(BASE, experts_per_rank=8, top_k=32),
    "fp8 rows that need padding on the wire": replace(BASE, hidden=48, quantized=True),
    "more channels than tokens": replace(BASE, channels=64, tokens=[1, 2, 0, 3]),
    "a plan used five times": replace(BASE, reuse=4, alignment=2, capacity="exact"),
    "a plan of fp8 rows used again": replace(BASE, reuse=2, quantized=True, layout="rank"),
    "async, staged, with bias": replace(
        BASE, async_op=True, in_place=False, bias="matrix", combine_weights="other"
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    run(EDGES[name])


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, layout):
    run(replace(BASE, dtype=dtype, layout=layout, hidden=72, bias="row"))


def test_bits_do_not_depend_on_channels_or_the_run():
    case = Case(ranks_per_node=2, tokens=[20, 17, 0, 11, 20, 8], experts_per_rank=5, top_k=8, hidden=200)
    first = run(replace(case, channels=1))
    for channels in (1, 2, 3, 7):
        for rank, (got, want) in enumerate(zip(run(replace(case, channels=channels)), first, strict=True)):
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                assert_same(a, b, f"{channels} channels, rank {rank}, result {i}")


def test_large_rows_are_streamed_past_the_caches():
    def main(comm):
        torch.manual_seed(comm.rank)
        x = torch.randn(64, 4096).bfloat16()
        ids = torch.rand(64, 8).argsort(1)[:, :4].contiguous()
        results = []
        for threshold in (0, 1 << 40):
            buf = moecomm.Buffer(comm, hidden=4096, num_experts=8, top_k=4, max_tokens=64)
            buf.backend.memory.native.set_stream_threshold(threshold)
            out = buf.dispatch(x, ids)
            results.append((out.x.clone(), buf.combine(out.x.clone(), out.handle)))
        comm.barrier()
        return results

    for (x, y), (x2, y2) in moecomm.run_local(main, 4, ranks_per_node=2):
        assert_same(x, x2, "rows")
        assert_same(y, y2, "y")
