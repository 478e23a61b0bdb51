"""Measurements of the cuda world on one GPU, for `python -m bench device` (bench/device_run.py).

Ranks are threads that share the GPU. Two "nodes" run both hops of the real kernels; the rail is a copy by the copy
engine. Every timed result is overwritten before, and compared bit for bit with the expected one. Times are those of
graph replays, from the start of the first rank to the end of the last. Numbers of multiprocessors are totals over all
ranks.

The traffic counts every byte that must be read or written once. Dispatch reads the row of each token, writes it to
and reads it from staging per other node, and writes one row per pick; combine is the reverse. The ceiling is the rate
of a device-to-device copy.
"""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass

import torch

import moecomm
from moecomm import gate, quant, reference, tuning

GEOMETRIES = ((1, 8), (2, 4), (4, 2))
SMS = (16, 24, 40, 64, 128)
CALLS = ("dispatch bf16", "dispatch fp8", "combine bf16")
_capturing = (
    threading.Lock()
)  # the begin of a capture synchronizes the device, which fails during other captures


@dataclass(frozen=True)
class Shape:
    """The published shape: tokens per rank, hidden, experts, top-k with groups."""

    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    groups: int = 8
    top_groups: int = 4


# -- checks --------------------------------------------------------------------------------------------------

SMALL = ((1, 1), (1, 4), (2, 2), (4, 1))


def check_small_worlds(device, worlds=SMALL):
    """Compare dispatch and combine of small worlds with the oracle; return the number of cases."""
    cases = [
        (nodes, per_node, layout, capacity, kind)
        for nodes, per_node in worlds
        for layout in ("expert", "rank")
        for capacity in (None, 200)
        for kind in (None, "fp8")
    ]
    for nodes, per_node, layout, capacity, kind in cases:
        size = nodes * per_node
        world = small_world(size, seed=size)
        moecomm.run_local(
            lambda comm: check_rank(comm, world, layout, capacity, kind),
            size,
            ranks_per_node=per_node,
            device=device,
        )
    return len(cases)


def small_world(size, seed, tokens=23, hidden=512, experts_per_rank=4, top_k=4):
    """(xs, ids, weights) by rank, on the host. Ranks have different numbers of tokens; one has none."""
    g = torch.Generator().manual_seed(seed)
    counts = [0 if r == 1 else tokens - 3 * r % tokens for r in range(size)]
    xs = [torch.randn((t, hidden), generator=g).bfloat16() for t in counts]
    ids = [
        torch.rand((t, experts_per_rank * size), generator=g).argsort(1)[:, :top_k].contiguous()
        for t in counts
    ]
    ids = [i.masked_fill(torch.rand(i.shape, generator=g) < 0.2, -1) for i in ids]
    return xs, ids, [torch.rand((t, top_k), generator=g) for t in counts]


def check_rank(comm, world, layout, capacity, kind):
    """Check a small world, as one rank."""
    xs, ids, weights = world
    experts, top_k, rank = 4 * comm.size, ids[0].shape[1], comm.rank
    coded = [quant.quantize(x) for x in xs] if kind else None
    want = reference.dispatch(
        [c[0] for c in coded] if kind else xs,
        ids,
        weights,
        num_experts=experts,
        layout=layout,
        capacity=capacity,
        scales=[c[1] for c in coded] if kind else None,
    )
    buf = moecomm.Buffer(
        comm, hidden=xs[0].shape[1], num_experts=experts, top_k=top_k, max_tokens=32, num_sms=2
    )
    move = lambda t: t.to(comm.device)  # noqa: E731
    out = buf.dispatch(
        move(xs[rank]), move(ids[rank]), move(weights[rank]), layout=layout, capacity=capacity, quant=kind
    )
    torch.cuda.current_stream().synchronize()
    for name in (
        "x",
        "scales",
        "topk_weights",
        "topk_ids",
        "tokens_per_expert",
        "rows_per_expert",
        "source_rank",
        "source_token",
    ):
        expect_equal(getattr(out, name), getattr(want[rank], name), f"{comm}: {name}")
    if not kind:
        rows = [(w.x.float() * (r + 1) / 4).to(w.x.dtype) for r, w in enumerate(want)]
        by_expert = layout == "expert"
        expected = reference.combine(
            rows,
            want,
            [len(x) for x in xs],
            ranks_per_node=comm.ranks_per_node,
            topk_weights=[w.topk_weights for w in want] if by_expert else None,
        )
        out.handle.rows.copy_(move(rows[rank]))
        y = torch.full(xs[rank].shape, float("nan"), dtype=xs[rank].dtype, device=comm.device)
        buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights if by_expert else None, out=y)
        torch.cuda.current_stream().synchronize()
        expect_equal(y, expected[rank], f"{comm}: y")
    comm.barrier()
    buf.close()


def expect_equal(got, want, what):
    """Raise AssertionError unless the bits are equal."""
    if want is None:
        assert got is None, what
        return
    got = got.cpu()
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"
    )
    wrong = int((as_bits(got) != as_bits(want)).sum())
    assert wrong == 0, f"{what}: {wrong} elements differ"


def as_bits(t):
    """A tensor as integers."""
    return t.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    )


# -- expected results, computed by torch on the GPU ----------------------------------------------------------


class World:
    """Inputs of all ranks on one GPU, and the expected rows of each rank."""

    def __init__(self, shape, size, device):
        g = torch.Generator(device=device).manual_seed(size)
        self.shape, self.size = shape, size
        self.x = torch.randn((size, shape.tokens, shape.hidden), generator=g, device=device).bfloat16()
        logits = torch.randn((size * shape.tokens, shape.experts), generator=g, device=device)
        ids, weights = gate.sigmoid_gate(
            logits, shape.top_k, num_groups=shape.groups, top_groups=shape.top_groups
        )
        self.ids = ids.view(size, shape.tokens, shape.top_k).contiguous()
        self.weights = weights.float().view(size, shape.tokens, shape.top_k).contiguous()
        flat = self.ids.flatten()
        self.order = torch.sort(flat, stable=True).indices  # (expert, source rank, source token)
        self.owner = flat[self.order] // (shape.experts // size)
        self.counts = torch.bincount(self.owner, minlength=size).tolist()

    def sources(self, rank):
        """Flat index of the token of each row that a rank receives."""
        return self.order[self.owner == rank] // self.shape.top_k

    def row_weights(self, rank):
        """Weight of each row that a rank receives."""
        return self.weights.flatten()[self.order[self.owner == rank]]

    def nodes_per_token(self, nodes):
        """Number of other nodes per token, summed over all tokens."""
        node = self.ids // (self.shape.experts // nodes)
        own = (torch.arange(self.size, device=node.device) // (self.size // nodes))[:, None]
        hit = torch.stack([(node == n).any(-1) & (own != n) for n in range(nodes)])
        return int(hit.sum())

    def combined(self, rank, scale, nodes):
        """Expected y of one rank, if experts return scale(rank) * row. FP32 sums by node, then ascending expert."""
        shape, per_rank = self.shape, self.shape.experts // self.size
        ids, at = self.ids[rank].sort(-1)
        weights = self.weights[rank].gather(1, at)
        own, x = rank // (self.size // nodes), self.x[rank]
        total, started = (
            torch.zeros_like(x, dtype=torch.float32),
            torch.zeros(len(x), dtype=torch.bool, device=x.device),
        )
        for n in range(nodes):
            part, found = (
                torch.zeros_like(x, dtype=torch.float32),
                torch.zeros(len(x), dtype=torch.bool, device=x.device),
            )
            for k in range(shape.top_k):
                here = ids[:, k] // (shape.experts // nodes) == n
                row = (
                    x.float() * scale((ids[:, k] // per_rank).float())[:, None]
                ).bfloat16().float() * weights[:, k : k + 1]
                part = torch.where(here[:, None], torch.where(found[:, None], part + row, row), part)
                found = found | here
            if n != own:
                part = part.bfloat16().float()
            total = torch.where(found[:, None], torch.where(started[:, None], total + part, part), total)
            started = started | found
        return total.bfloat16()


def must_move(world, nodes, call):
    """Bytes that one call must read and write, over all ranks."""
    s = world.shape
    plain, coded = 2 * s.hidden, s.hidden + 4 * (s.hidden // 128)
    tokens, picks, rail = world.size * s.tokens, world.size * s.tokens * s.top_k, world.nodes_per_token(nodes)
    if call == "dispatch fp8":
        return tokens * plain + (2 * rail + picks) * coded
    return (tokens + 2 * rail + picks) * plain


# -- times ---------------------------------------------------------------------------------------------------


def copy_ceiling(size=4 << 30, repeats=10):
    """Rate of a large device-to-device copy in GB/s, reads plus writes."""
    a, b = (
        torch.empty(size, dtype=torch.uint8, device="cuda").random_(),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    return 2 * size / timed(lambda: b.copy_(a), repeats) / 1e9


def timed(work, repeats):
    """Median time of work() in seconds, measured with events."""
    work()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def measure(args, shape, nodes, per_node, sms, ceiling, choose=None):
    """Measure one geometry with one total number of multiprocessors; return rows. `choose` replaces choose_plan."""
    size = nodes * per_node
    torch.cuda.empty_cache()  # windows cannot use memory that torch caches
    world = World(shape, size, args.device)
    torch.cuda.synchronize()  # the streams of the ranks do not wait for this stream
    capacity = max(world.counts)

    def scale(rank):
        """Factor of a rank; rank is a number or a tensor."""
        return (rank + 1) / 4

    reference_event = torch.cuda.Event(enable_timing=True)
    reference_event.record()
    reference_event.synchronize()
    # The override also allows odd numbers per rank, which num_sms of Buffer does not.
    with tuning.overriding(
        choose or (lambda hardware, traffic: tuning.choose_plan(hardware, traffic, sms // size))
    ):
        spans = moecomm.run_local(
            lambda comm: rank_main(comm, args, world, capacity, scale, nodes, reference_event),
            size,
            ranks_per_node=per_node,
            device=args.device,
        )
    rows = []
    for i, call in enumerate(CALLS):
        us = 1e3 * (max(s[i][1] for s in spans) - min(s[i][0] for s in spans)) / args.iterations
        gbs = must_move(world, nodes, call) / us / 1e3
        rows.append(
            dict(
                call=call,
                nodes=nodes,
                ranks_per_node=per_node,
                sms=sms,
                us=us,
                gbs=gbs,
                fraction=gbs / ceiling,
                wrong=sum(s[i][2] for s in spans),
            )
        )
    return rows


def rank_main(comm, args, world, capacity, scale, nodes, origin):
    """Measure as one rank; return (start ms, end ms, wrong elements) of each call."""
    s, rank = world.shape, comm.rank
    buf = moecomm.Buffer(
        comm,
        hidden=s.hidden,
        num_experts=s.experts,
        top_k=s.top_k,
        max_tokens=s.tokens,
        num_sms=2,
        arena_bytes=arena_bytes(capacity, s),
    )
    x, ids, weights = world.x[rank], world.ids[rank], world.weights[rank]
    rows, sources = world.counts[rank], world.sources(rank)
    found = []
    for call in CALLS:
        if call.startswith("dispatch"):
            kind = "fp8" if call.endswith("fp8") else None
            run = lambda kind=kind: buf.dispatch(x, ids, weights, capacity=capacity, quant=kind)  # noqa: E731
        else:
            out = buf.dispatch(x, ids, weights, capacity=capacity)
            torch.mul(out.x, scale(rank), out=out.handle.rows)
            y = torch.full_like(x, float("nan"))
            run = lambda: buf.combine(out.handle.rows, out.handle, topk_weights=out.topk_weights, out=y)  # noqa: E731
        result, span = replay(
            comm,
            run,
            args.iterations,
            origin,
            lambda out: (out,) if torch.is_tensor(out) else (out.x, out.scales),
        )
        if call == "dispatch bf16":
            wrong = differing(result.x[:rows], world.x.flatten(0, 1)[sources]) + int(
                (result.x[rows:] != 0).sum()
            )
        elif call == "dispatch fp8":
            codes, scales = quant.quantize(world.x.flatten(0, 1)[sources].cpu())
            wrong = differing(result.x[:rows].cpu(), codes) + differing(result.scales[:rows].cpu(), scales)
        else:
            wrong = differing(result, world.combined(rank, scale, nodes))
        found.append((*span, wrong))
        del result
        out = None
        comm.barrier()
    buf.close()
    return found


def arena_bytes(capacity, shape):
    """Arena for two dispatches of `capacity` rows and the experts' outputs."""
    return 3 * capacity * (4 * shape.hidden + 16 * shape.top_k + 128) + (64 << 20)


def differing(got, want):
    """Number of elements whose bits differ."""
    return (
        int((as_bits(got) != as_bits(want)).sum())
        if got.shape == want.shape
        else max(got.numel(), want.numel())
    )


def captured(comm, run):
    """Capture run(), which has run before: (graph, result).

    One rank thread captures at a time, while the others wait.
    """
    torch.cuda.current_stream().synchronize()
    comm.barrier()
    graph = torch.cuda.CUDAGraph()
    with (
        _capturing,
        torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"),
    ):
        result = run()
    comm.barrier()
    return graph, result


def replay(comm, run, iterations, origin, outputs):
    """Measure graph replays, started together on all ranks: (result, (start ms, end ms)).

    outputs(result) returns the tensors that every replay must write completely.
    """
    run()
    graph, result = captured(comm, run)
    for _ in range(3):
        graph.replay()
    torch.cuda.current_stream().synchronize()
    comm.barrier()  # no rank writes to the outputs any more
    for out in outputs(result):
        if out is not None:
            as_bits(out).fill_(-1 if out.element_size() > 1 else 255)
    torch.cuda.current_stream().synchronize()
    comm.barrier()
    return result, replays(graph, iterations, origin)


def replays(graph, iterations, origin):
    """Replay `iterations` times; return (start ms, end ms) relative to the event `origin`."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(iterations):
        graph.replay()
    end.record()
    end.synchronize()
    return origin.elapsed_time(begin), origin.elapsed_time(end)
