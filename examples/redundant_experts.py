"""Redundant experts: skewed traffic, and a rebalance while it runs. `python examples/redundant_experts.py
[picture.png]`

DeepSeek-V3's prefill unit in small: 8 ranks on 2 nodes, each hosting 4 of 32 experts and one redundant one. Traffic is
skewed and drifts. The monitor counts what dispatch sees; when the gain exceeds the cost of moving weights, the
weights move in the background, and all ranks change over between the same two steps.
"""

import sys

import torch

import moecomm
from moecomm.balance import LoadMonitor, rebalance

RANKS, NODES, EXPERTS, TOP_K, TOKENS, HIDDEN, STEPS = 8, 2, 32, 4, 256, 64, 60


def traffic(rank, step):
    """A step's tokens of one rank and the experts they go to: some far more popular than others, and slowly
    changing.
    """
    same = torch.Generator().manual_seed(7)  # popularity is equal on all ranks ...
    popularity = torch.randn(EXPERTS, generator=same)
    for _ in range(step // 10):
        popularity += 0.2 * torch.randn(EXPERTS, generator=same)
    own = torch.Generator().manual_seed(step * RANKS + rank)  # ... and every rank's tokens are its own
    noise = -torch.log(-torch.log(torch.rand((TOKENS, EXPERTS), generator=own).clamp_min(1e-9)))
    weights, ids = (popularity + noise).topk(TOP_K)
    return torch.randn((TOKENS, HIDDEN), generator=own), ids, weights.softmax(-1)


def serve(comm):
    """All steps of one rank; its rows per step, and the step of the change."""
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

        if step == 20:  # every few minutes, in real life
            advice = monitor.advise(
                placement,
                seconds_per_row=2e-6,
                bytes_per_expert=44e6,
                bytes_per_second=50e9,  # as in the real model
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
                pending = moecomm.balance.migrate(
                    placement, weights, comm
                )  # the steps go on by the old placement
        if pending and step == 24:
            weights = pending.wait()
            buf.use(placement)
            pending, changed = None, step + 1
    comm.barrier()
    return rows, changed


def draw(path, rows, changed):
    """Rows per rank over the steps, and the heaviest rank over the mean."""
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
        title="Rows of every rank; dashed: the new placement is in force",
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
    print(f"every result was right; picture: {path}")
