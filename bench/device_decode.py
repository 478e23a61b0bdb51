"""Part of `python -m bench device`: decode steps with 1 to 128 tokens per rank, replayed from graphs, and their floor.

A step is decode_dispatch (in FP8) and decode_combine, each with both phases. A graph contains two steps. The floor is
the time of the necessary traffic at the rate of a device-to-device copy. Necessary for dispatch: read the row of each
token, write and read a message per token and rank of another node, write a packed row per pick. For combine: read the
row of each pick, write and read each answer from another node, write each sum. Messages inside a node are read from
staging; that copy is not part of the floor.
"""

from __future__ import annotations

import torch

import moecomm
from moecomm import quant, reference, tuning

from . import device as bench

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
GEOMETRIES = ((1, 8), (2, 4), (4, 2))
SMS = 128  # total over all ranks
TARGET = "at 1 token <= 20 us; at 128 within 1.6x of the floor plus 12 us"


def check_small_worlds(device, worlds=bench.SMALL):
    """Compare decode steps of small worlds with the oracle; return the number of cases."""
    cases = [(nodes, per_node, kind) for nodes, per_node in worlds for kind in (None, "fp8")]
    for nodes, per_node, kind in cases:
        world = bench.small_world(nodes * per_node, seed=7 * nodes + per_node)
        moecomm.run_local(
            lambda comm: check_rank(comm, world, kind),
            nodes * per_node,
            ranks_per_node=per_node,
            device=device,
        )
    return len(cases)


def check_rank(comm, world, kind):
    """Check a small world, as one rank: three steps, so both epochs are used."""
    xs, ids, weights = world
    experts, rank = 4 * comm.size, comm.rank
    coded = [quant.quantize(x) if kind else (x, None) for x in xs]
    want = reference.decode_dispatch(
        [c[0] for c in coded],
        ids,
        num_experts=experts,
        max_tokens=32,
        scales=[c[1] for c in coded] if kind else None,
    )
    rows = [(w.x.float() * (r + 1) / 4).bfloat16() for r, w in enumerate(want)]
    sums = reference.decode_combine(
        rows, ids, weights, num_experts=experts, ranks_per_node=comm.ranks_per_node
    )
    buf = moecomm.Buffer(
        comm,
        hidden=xs[0].shape[1],
        num_experts=experts,
        top_k=ids[0].shape[1],
        max_tokens=32,
        num_sms=2,
        decode=True,
    )
    x, i, w = (t[rank].to(comm.device) for t in world)
    for _ in range(3):
        recv, hook = buf.decode_dispatch(x, i, quant=kind)
        hook()
        bench.expect_equal(recv.counts, want[rank].counts, f"{comm}: counts")
        for e, n in enumerate(want[rank].counts.tolist()):
            bench.expect_equal(recv.x[e, :n], want[rank].x[e, :n], f"{comm}: x of expert {e}")
        recv.handle.rows.copy_(rows[rank])
        y = torch.full_like(x, float("nan"))
        _, hook = buf.decode_combine(recv.handle.rows, i, w, recv.handle, out=y)
        hook()
        bench.expect_equal(y, sums[rank], f"{comm}: y")
    comm.barrier()
    buf.close()


def must_move(world, nodes):
    """Bytes that one step must read and write, over all ranks."""
    s, per_node = world.shape, world.size // nodes
    plain, coded = 2 * s.hidden, s.hidden + 4 * (s.hidden // 128)
    owner = world.ids // (s.experts // world.size)
    far = owner // per_node != (torch.arange(world.size, device=owner.device) // per_node)[:, None, None]
    messages = sum(int(((owner == r) & far).any(-1).sum()) for r in range(world.size))
    tokens, picks, answers = world.size * s.tokens, owner.numel(), int(far.sum())
    return tokens * plain + (2 * messages + picks) * coded + (picks + 2 * answers + tokens) * plain


def expected_sums(world, rank, scale):
    """Expected y of one rank, if experts return scale(rank) * row: FP32 sums by ascending k, rounded once."""
    s, x = world.shape, world.x[rank]
    owner, total = world.ids[rank] // (s.experts // world.size), None
    for k in range(s.top_k):
        term = (x.float() * scale(owner[:, k].float())[:, None]).bfloat16().float() * world.weights[rank][
            :, k : k + 1
        ]
        total = term if total is None else total + term
    return total.bfloat16()


def rows_of_expert(world, expert):
    """Flat index of the token of each row that an expert receives, by source rank, then token."""
    return world.order[world.ids.flatten()[world.order] == expert] // world.shape.top_k


def measure(args, ceiling, tokens=TOKENS, geometries=GEOMETRIES):
    """Yield the rows of the table."""
    for nodes, per_node in geometries:
        size = nodes * per_node
        for count in tokens:
            torch.cuda.empty_cache()  # windows cannot use memory that torch caches
            world = bench.World(bench.Shape(tokens=count), size, args.device)
            torch.cuda.synchronize()
            origin = torch.cuda.Event(enable_timing=True)
            origin.record()
            origin.synchronize()
            with tuning.overriding(
                lambda hardware, traffic: tuning.choose_plan(hardware, traffic, SMS // size)
            ):
                spans = moecomm.run_local(
                    lambda comm: rank_main(comm, args, world, origin),
                    size,
                    ranks_per_node=per_node,
                    device=args.device,
                )
            us = 1e3 * (max(s[1] for s in spans) - min(s[0] for s in spans)) / args.iterations / 2
            floor = must_move(world, nodes) / ceiling / 1e3
            yield dict(
                nodes=nodes,
                ranks_per_node=per_node,
                tokens=count,
                us=us,
                floor_us=floor,
                wrong=sum(s[2] for s in spans),
            )


def rank_main(comm, args, world, origin):
    """Measure as one rank; return (start ms, end ms, wrong elements)."""
    s, rank = world.shape, comm.rank
    buf = moecomm.Buffer(
        comm,
        hidden=s.hidden,
        num_experts=s.experts,
        top_k=s.top_k,
        max_tokens=s.tokens,
        num_sms=2,
        arena_bytes=1 << 20,
        decode=True,
    )
    x, ids, weights = world.x[rank], world.ids[rank], world.weights[rank]

    def scale(rank):
        """Factor of a rank; rank is a number or a tensor."""
        return (rank + 1) / 4

    y, flat = torch.full_like(x, float("nan")), world.x.flatten(0, 1)
    local = range(rank * buf.experts_per_rank, (rank + 1) * buf.experts_per_rank)
    sources = [rows_of_expert(world, e) for e in local]

    def step():
        recv, _ = buf.decode_dispatch(x, ids, return_hook=False)
        buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False, out=y)
        return recv

    for _ in range(2):  # write the experts' output of both epochs; its position depends on the routing only
        recv, _ = buf.decode_dispatch(x, ids, return_hook=False)
        for e, tokens in enumerate(sources):
            recv.handle.rows[e, : len(tokens)] = (flat[tokens].float() * scale(rank)).bfloat16()
        buf.decode_combine(recv.handle.rows, ids, weights, recv.handle, return_hook=False)
    recv, span = bench.replay(
        comm, lambda: [step(), step()][1], args.iterations, origin, lambda out: (y, out.counts, out.x)
    )
    wrong = bench.differing(y, expected_sums(world, rank, scale))
    for e, tokens in enumerate(sources):
        codes, scales = quant.quantize(flat[tokens].cpu())
        wrong += bench.differing(recv.x[e, : len(tokens)].cpu(), codes) + bench.differing(
            recv.scales[e, : len(tokens)].cpu(), scales
        )
    wrong += bench.differing(recv.counts.cpu(), torch.tensor([len(t) for t in sources]))
    comm.barrier()
    buf.close()
    return *span, wrong


def markdown(rows):
    """Format the rows as lines of a table for docs/measurements.md."""
    lines = [
        f"Decode, dispatch (FP8) and combine (BF16) together, {SMS} SMs over all ranks, replayed from graphs; "
        f"target: {TARGET}.",
        "",
        "| nodes x ranks | tokens per rank | us | floor us | us / floor | wrong |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['nodes']}x{r['ranks_per_node']} | {r['tokens']} | {r['us']:.1f} | {r['floor_us']:.1f} | "
        f"{r['us'] / r['floor_us']:.2f} | {r['wrong']} |"
        for r in rows
    ]
