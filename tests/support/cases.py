"""Random cases: all options of dispatch and combine, in any world, against the oracle, bit for bit.

`make_case(choose, size)` gets each value from `choose(list)`, so that hypothesis, a seeded random generator and the
mpirun suites share one description.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from worlds import assert_received, assert_same, random_ids

import moecomm
from moecomm import quant, reference, reference_quant

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@dataclass
class Case:
    """One random world and the options of its calls. Equal on all ranks."""

    ranks_per_node: int
    tokens: list  # by rank
    experts_per_rank: int = 4
    top_k: int = 3
    hidden: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: str = "expert"
    alignment: int = 1
    capacity: str = "none"  # none | exact (rows of the fullest rank) | spare (five more)
    routing: str = "random"  # random | one_expert | one_rank | masked (no picks)
    quantized: bool = False  # FP8 rows with scales
    quant: str | None = None  # dispatch quantizes rows to FP8
    scale_layout: str = "row"
    wire: str | None = None  # wire format of combine
    channels: int | None = None
    weights: bool = True  # dispatch sends topk_weights
    combine_weights: str = (
        "arrived"  # none | arrived (views of the window) | other (a function of them, staged)
    )
    bias: str = "none"  # none | row | matrix
    in_place: bool = True  # the experts write to handle.rows
    async_op: bool = False
    ids: torch.dtype = torch.int64
    reuse: int = 0  # number of further dispatches with the first handle
    seed: int = 0
    size: int = field(init=False)

    def __post_init__(self):
        self.size = len(self.tokens)

    @property
    def num_experts(self):
        """Number of experts over all ranks."""
        return self.size * self.experts_per_rank


def make_case(choose, size=None, ranks_per_node=None):
    """Make a Case; choose(list) selects the value of each field."""
    if size is None:
        ranks_per_node = choose([1, 2, 3])
        size = ranks_per_node * choose([1, 2, 3])
    per_rank = choose([1, 2, 4, 7, 32])
    dtype = choose(DTYPES)
    quantized = choose([False, False, True])
    hidden = 16 * choose([1, 2, 5, 9, 24]) if quantized else 16 // dtype.itemsize * choose([1, 2, 5, 9, 33])
    layout = choose(["expert", "rank"])
    narrow = dtype != torch.float64
    quant = choose([None, "fp8", "fp8_ue8m0"]) if narrow and not quantized and hidden % 16 == 0 else None
    return Case(
        ranks_per_node=ranks_per_node,
        tokens=[choose([0, 1, 3, 8, 17]) for _ in range(size)],
        experts_per_rank=per_rank,
        top_k=choose([k for k in (1, 2, 3, 8, 17, 32) if k <= size * per_rank]),
        hidden=hidden,
        dtype=dtype,
        layout=layout,
        alignment=choose([1, 1, 2, 8]) if layout == "expert" else 1,
        capacity=choose(["none", "none", "exact", "spare"]),
        routing=choose(["random", "random", "one_expert", "one_rank", "masked"]),
        quantized=quantized,
        quant=quant,
        scale_layout=choose(["row", "column"]) if quant or quantized else "row",
        wire=choose([None, "fp8", "logfmt10"]) if narrow else None,
        channels=choose([None, 1, 2, 5]),
        weights=choose([True, False]),
        combine_weights=choose(["none", "arrived", "other"]),
        bias=choose(["none", "row", "matrix"]),
        in_place=choose([True, False]),
        async_op=choose([False, True]),
        ids=choose([torch.int64, torch.int32]),
        reuse=choose([0, 0, 1, 2]),
        seed=choose(list(range(100))),
    )


def routing_of(case):
    """Make topk_ids by rank."""
    g = torch.Generator().manual_seed(case.seed)
    ids = [random_ids(t, case.top_k, case.num_experts, g) for t in case.tokens]
    if case.routing == "masked":
        return [torch.full_like(i, -1) for i in ids]
    last = case.num_experts - 1
    if case.routing == "one_expert":  # each token picks the last expert, in any slot
        return [
            torch.full_like(i, -1).scatter_(1, torch.randint(case.top_k, (len(i), 1), generator=g), last)
            for i in ids
        ]
    if case.routing == "one_rank":  # each token picks as many experts of the last rank as possible
        first = case.num_experts - case.experts_per_rank
        return [torch.where(i >= first, i, -1) for i in ids]
    return ids


def payload_of(case, round):
    """Make (xs, scales or None, weights or None) by rank. Rows of dispatch are random bits, including NaN."""
    g = torch.Generator().manual_seed(1000 * case.seed + round)
    item = 1 if case.quantized else case.dtype.itemsize
    raw = [
        torch.randint(0, 256, (t, case.hidden * item), generator=g, dtype=torch.uint8) for t in case.tokens
    ]
    xs = [
        r.view(torch.float8_e4m3fn if case.quantized else case.dtype).view(len(r), case.hidden) for r in raw
    ]
    scales = (
        [torch.randn((t, -(-case.hidden // 128)), generator=g) for t in case.tokens]
        if case.quantized
        else None
    )
    weights = [torch.randn((t, case.top_k), generator=g) for t in case.tokens] if case.weights else None
    return xs, scales, weights


def arriving(case, payload):
    """Return the payload as received: quantized rows are FP8 rows."""
    xs, _scales, weights = payload
    if case.quant is None:
        return payload
    coded = [reference_quant.quantize(x, scale="ue8m0" if case.quant == "fp8_ue8m0" else "f32") for x in xs]
    return (
        [c for c, _ in coded],
        [quant.pack_ue8m0(s) if case.quant == "fp8_ue8m0" else s for _, s in coded],
        weights,
    )


def expert_rows(want, case, round):
    """Make the experts' output on all ranks: random rows that do not depend on the rank."""
    out = []
    for rank, w in enumerate(want):
        g = torch.Generator().manual_seed(77 * case.seed + 13 * rank + round)
        out.append(torch.randn((len(w.x), case.hidden), generator=g).to(case.dtype))
    return out


def check_case(comm, case, rounds=2):
    """Run the case on this rank and compare everything with the oracle.

    Returns the bits of out.x and y of every round.
    """
    ids = routing_of(case)
    first = arriving(case, payload_of(case, 0))
    options = dict(num_experts=case.num_experts, layout=case.layout, expert_alignment=case.alignment)
    fullest = max(len(w.x) for w in reference.dispatch(first[0], ids, first[2], scales=first[1], **options))
    capacity = {"none": None, "exact": fullest, "spare": fullest + 5}[case.capacity]
    buf = moecomm.Buffer(
        comm,
        hidden=case.hidden,
        num_experts=case.num_experts,
        top_k=case.top_k,
        max_tokens=max(*case.tokens, 1),
        dtype=case.dtype,
        channels=case.channels,
    )
    seen = []
    handle = None
    for round in range(rounds + case.reuse):
        xs, scales, weights = payload_of(case, round)
        coded, coded_scales, _ = arriving(case, (xs, scales, weights))
        want = reference.dispatch(coded, ids, weights, scales=coded_scales, capacity=capacity, **options)
        r = comm.rank
        x = (xs[r], scales[r]) if case.quantized else xs[r]
        if round < rounds:
            out = buf.dispatch(
                x,
                ids[r].to(case.ids),
                weights[r] if case.weights else None,
                layout=case.layout,
                expert_alignment=case.alignment,
                capacity=capacity,
                quant=case.quant,
                scale_layout=case.scale_layout,
                async_op=case.async_op,
            )
        else:
            out = buf.dispatch(
                x,
                None,
                weights[r] if case.weights else None,
                handle=handle,
                quant=case.quant,
                scale_layout=case.scale_layout,
                async_op=case.async_op,
            )
        out = out.wait() if case.async_op else out
        handle = out.handle
        assert_received(out, want[r], r)
        y = check_combine(buf, case, out, want, round, ids)
        seen += [out.x.clone(), y]
    comm.barrier()
    buf.close()
    return seen


def check_combine(buf, case, out, want, round, ids):
    """Run combine into a tensor filled with NaN; return it."""
    r, rows = buf.comm.rank, expert_rows(want, case, round)
    kind = case.combine_weights if case.layout == "expert" else "none"
    # Any function of the weights is allowed; this one is not the identity and needs no rounding.
    theirs = {
        "none": None,
        "arrived": [w.topk_weights for w in want],
        "other": [w.topk_weights * 2 for w in want],
    }[kind]
    mine = {"none": lambda: None, "arrived": lambda: out.topk_weights, "other": lambda: out.topk_weights * 2}[
        kind
    ]()
    g = torch.Generator().manual_seed(5)
    bias = {
        "none": None,
        "row": [torch.randn(case.hidden, generator=g) for _ in case.tokens],
        "matrix": [torch.randn((t, case.hidden), generator=g) for t in case.tokens],
    }[case.bias]
    expected = reference.combine(
        rows,
        want,
        case.tokens,
        ranks_per_node=case.ranks_per_node,
        topk_weights=theirs,
        bias=bias,
        wire=reference_quant.wire(case.wire),
    )
    if case.in_place:
        out.handle.rows.copy_(rows[r])
    y = torch.full((case.tokens[r], case.hidden), float("nan"), dtype=case.dtype)
    got = buf.combine(
        out.handle.rows if case.in_place else rows[r],
        out.handle,
        topk_weights=mine,
        bias=bias[r] if bias else None,
        wire=case.wire,
        async_op=case.async_op,
        out=y,
    )
    got = got.wait() if case.async_op else got
    assert got.data_ptr() == y.data_ptr() or not len(y)
    assert_same(y, expected[r], f"rank {r}: y of round {round}")
    return y
