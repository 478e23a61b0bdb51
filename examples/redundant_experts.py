"""Redundant experts: skewed traffic, and a rebalance during the run.

    python examples/redundant_experts.py [picture.png]

A small version of DeepSeek-V3's prefill unit: 8 ranks on 2 nodes, each with 4 of 32 experts and a redundant one. The
traffic is skewed and drifts. The monitor counts the picks. If the gain of a rebalance exceeds the cost of moving the
weights, they move in the background, and all ranks change to the new placement between the same two steps.
"""

import sys

import torch

import moecomm
from moecomm.balance import LoadMonitor, rebalance

RANKS, NODES, EXPERTS, TOP_K, TOKENS, HIDDEN, STEPS = 8, 2, 32, 4, 256, 64, 60


def traffic(rank, step):
    """Tokens, picks and weights of one rank in one step. Few experts are popular, and popularity changes slowly."""
    same = torch.Generator().manual_seed(7)  # the popularity is equal on all ranks
    popularity = torch.randn(EXPERTS, generator=same)
    for _ in range(step // 10):
        popularity += 0.2 * torch.randn(EXPERTS, generator=same)
    own = torch.Generator().manual_seed(step * RANKS + rank)  # each rank has different tokens
    noise = -torch.log(-torch.log(torch.rand((TOKENS, EXPERTS), generator=own).clamp_min(1e-9)))
    weights, ids = (popularity + noise).topk(TOP_K)
    return torch.randn((TOKENS, HIDDEN), generator=own), ids, weights.softmax(-1)


def serve(comm):
    """Run all steps of one rank; return its rows per step, and the first step with the new placement."""
    expert_weights = torch.rand((EXPERTS, HIDDEN), generator=torch.Generator().manual_seed(1)) + 0.5

    placement = rebalance(
        torch.ones(1, EXPERTS), num_replicas=EXPERTS + RANKS, num_nodes=NODES, num_ranks=RANKS
    )
    monitor = LoadMonitor(1, EXPERTS, half_life=8)
    buf = moecomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_tokens=TOKENS,
        dtype=torch.float32,
        placement=placement,
        replicas="optimal",
        monitor=monitor,
    )
    mine = slice(comm.rank * placement.slots_per_rank, (comm.rank + 1) * placement.slots_per_rank)
    weights = [expert_weights[placement.physical_to_logical[0, mine]].contiguous()]

    rows, pending, changed = [], None, None
    for step in range(STEPS):
        x, ids, shares = traffic(comm.rank, step)
        out = buf.dispatch(x, ids, shares)
        y = buf.combine(
            out.x * weights[0].repeat_interleave(out.tokens_per_expert, 0),
            out.handle,
            topk_weights=out.topk_weights,
        )
        torch.testing.assert_close(
            y, x * (shares[..., None] * expert_weights[ids]).sum(1), rtol=1e-4, atol=1e-4
        )
        rows.append(len(out.x))

        if step == 20:  # a real server does this every few minutes
            advice = monitor.advise(
                placement,
                seconds_per_row=2e-6,
                bytes_per_expert=44e6,
                bytes_per_second=50e9,  # values of the real model
                batches=1000,
                comm=comm,
                connected=True,
            )
            if comm.rank == 0:
                print(
                    f"step {step}: {len(advice.placement.moves)} slots would change; gain "
                    f"{1e3 * advice.gain:.1f} ms against {1e3 * advice.cost:.1f} ms of "
                    f"moving: {'worth it' if advice.pays else 'not worth it'}; balancedness "
                    f"{advice.before:.2f} -> {advice.after:.2f}"
                )
            if advice.pays:
                placement = advice.placement
                # Until the migration is complete, steps use the old placement.
                pending = moecomm.balance.migrate(placement, weights, comm)
        if pending and step == 24:
            weights = pending.wait()
            buf.use(placement)
            pending, changed = None, step + 1
    comm.barrier()
    return rows, changed


def draw(path, rows, changed):
    """Plot the rows of each rank over the steps, and the means before and after the change."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for rank, line in enumerate(rows.T):
        left.plot(line, linewidth=1, label=f"rank {rank}")
    left.axvline(changed - 0.5, color="black", linestyle="--", linewidth=1)
    left.set(
        xlabel="step",
        ylabel="rows",
        title="Rows of each rank; dashed: change to the new placement",
        ylim=(0, None),
    )
    bars = torch.arange(RANKS)
    right.bar(bars - 0.2, rows[:changed].mean(0), 0.4, label="before")
    right.bar(bars + 0.2, rows[changed:].mean(0), 0.4, label="after")
    right.axhline(TOKENS * TOP_K, color="black", linewidth=0.8)
    right.set(xlabel="rank", title="Mean rows per step")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    results = moecomm.run_local(serve, RANKS, ranks_per_node=RANKS // NODES)
    rows, changed = torch.tensor([r for r, _ in results]).T.float(), results[0][1]
    heaviest = rows.max(1).values / rows.mean(1)
    print(
        f"heaviest rank over the mean: {heaviest[:changed].mean():.2f} before, "
        f"{heaviest[changed:].mean():.2f} after step {changed}"
    )
    assert heaviest[changed:].mean() < heaviest[:changed].mean()
    path = sys.argv[1] if len(sys.argv) > 1 else "redundant_experts.png"
    draw(path, rows, changed)
    print(f"all results are correct; picture: {path}")
