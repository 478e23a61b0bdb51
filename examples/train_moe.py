"""Trains a small Mixture-of-Experts language model on Python's language reference, with experts over several ranks.

    mpirun -n 4 python examples/train_moe.py
    torchrun --nproc-per-node 4 examples/train_moe.py

Each rank has a part of each batch and a part of the experts. All other parameters are replicated, and their gradients
are summed over the ranks. The gate balances the experts by its bias, plus the small sequence-wise loss of
DeepSeek-V3. --check trains again on one rank with the whole batches and compares the losses.
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own spelling

import moecomm
from moecomm.gate import Gate, balance_loss, count_picks
from moecomm.nn import MoE
from moecomm.overlap import Trace


class Block(nn.Module):
    """Causal attention and a MoE layer, each with a norm and a residual."""

    def __init__(self, args, buffer):
        super().__init__()
        self.heads = args.heads
        self.norms = nn.ModuleList(nn.RMSNorm(args.hidden) for _ in range(2))
        self.qkv, self.out = (
            nn.Linear(args.hidden, 3 * args.hidden, bias=False),
            nn.Linear(args.hidden, args.hidden, bias=False),
        )
        gate = Gate(args.hidden, args.experts, args.top_k, num_groups=4, top_groups=2)
        self.moe = MoE(args.hidden, args.intermediate, args.experts, args.top_k, 1, buffer, gate=gate)

    def forward(self, x):
        """x [B, S, hidden] -> (output [B, S, hidden], Routing)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y, routing = self.moe(self.norms[1](x), with_routing=True)
        return x + y, routing


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, args, buffer):
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, args.hidden), nn.Embedding(args.length, args.hidden)
        self.blocks = nn.ModuleList(Block(args, buffer) for _ in range(args.layers))
        self.norm, self.head = nn.RMSNorm(args.hidden), nn.Linear(args.hidden, 256, bias=False)

    def forward(self, text):
        """text int64 [B, S] -> (logits [B, S, 256], Routing of each block)."""
        x = self.embedding(text) + self.position(torch.arange(text.shape[1]))
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        return self.head(self.norm(x)), routings


def initial_state(args):
    """Initial parameters of the whole model, equal for any number of ranks."""

    def make(comm):
        torch.manual_seed(0)
        return Model(args, make_buffer(comm, args, 1)).state_dict()

    return moecomm.run_local(make, 1)[0]


def make_buffer(comm, args, max_tokens):
    """Make the Buffer that all layers share. It holds the rows of every layer until the backward pass."""
    shape = dict(
        hidden=args.hidden,
        num_experts=args.experts,
        top_k=args.top_k,
        max_tokens=max_tokens,
        dtype=torch.float32,
    )
    return moecomm.Buffer(
        comm, **shape, arena_bytes=moecomm.Buffer.arena_hint(comm, **shape, dispatches=args.layers + 2)
    )


def sum_over_ranks(comm, tensors):
    """Replace each tensor by its sum over the ranks, with one all-reduce."""
    if comm.size == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    if dist.is_initialized():
        dist.all_reduce(flat)
    else:
        from mpi4py import MPI

        assert MPI.COMM_WORLD.size == comm.size, "expected ranks of torchrun or mpirun"
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat.numpy())
    for t, s in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(s.view_as(t))


def train(comm, args, report=lambda rows: None):
    """Train; return [(step, loss, max load / mean load, share of communication)] and picks [step, layer, expert]."""
    text = torch.frombuffer(
        bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8
    )
    buffer = make_buffer(comm, args, -(-args.batch // comm.size) * args.length)
    model = Model(args, buffer)
    model.load_state_dict(initial_state(args))
    experts = {id(p) for block in model.blocks for p in block.moe.experts.parameters()}
    replicated = [p for p in model.parameters() if id(p) not in experts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    rows, loads = [], []
    for step in range(args.steps):
        begin = time.perf_counter()
        starts = torch.randint(
            len(text) - args.length - 1, (args.batch,), generator=torch.Generator().manual_seed(step)
        )
        starts = starts.tensor_split(comm.size)[comm.rank]
        batch = torch.stack([text[s : s + args.length + 1] for s in starts.tolist()]).long()
        with Trace(buffer) as trace:
            logits, routings = model(batch[:, :-1])
            # Divided by the size of the whole batch, so that losses and gradients of the ranks add up.
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / (
                args.batch * args.length
            )
            shape = batch.shape[0], args.length, -1
            balance = (
                sum(
                    balance_loss(r.affinities.view(shape), r.topk_ids.view(shape), args.alpha)
                    for r in routings
                )
                * len(batch)
                / args.batch
            )
            optimizer.zero_grad()
            (loss + balance).backward()
        counts = torch.stack([count_picks(r.topk_ids, args.experts) for r in routings]).float()
        total = loss.detach().clone()
        sum_over_ranks(comm, [total, counts, *(p.grad for p in replicated)])
        optimizer.step()
        for block, count in zip(model.blocks, counts, strict=True):
            block.moe.gate.update_bias(count, args.gamma)
        seconds = time.perf_counter() - begin
        share = sum(end - begin for _, _, begin, end in trace.spans("roles")) / seconds
        loads.append(counts)
        rows.append((step, float(total), float((counts.max(1).values / counts.mean(1)).max()), share))
        if step % args.every == 0 or step == args.steps - 1:
            report(rows[-args.every :])
    comm.barrier()
    return rows, torch.stack(loads)


def plot(path, rows, loads, alone):
    """Plot the loss, the balance, the share of communication and the load of each expert over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    steps, losses, balances, shares = zip(*rows)
    axes[0, 0].plot(steps, losses, label="this run")
    if alone:
        axes[0, 0].plot(*list(zip(*alone))[:2], "--", label="one rank")
    axes[0, 0].set(title="loss", xlabel="step", ylabel="nats per byte")
    axes[0, 0].legend()
    axes[0, 1].plot(steps, balances)
    axes[0, 1].set(title="balance", xlabel="step", ylabel="busiest expert / mean", ylim=(0.9, None))
    axes[1, 0].plot(steps, [100 * s for s in shares])
    axes[1, 0].set(
        title="communication (waiting included)", xlabel="step", ylabel="% of step time", ylim=(0, 100)
    )
    shown = axes[1, 1].imshow(
        (loads / loads.mean(-1, keepdim=True)).flatten(1).T,
        aspect="auto",
        vmin=0,
        vmax=3,
        interpolation="nearest",
    )
    axes[1, 1].set(title="load of every layer's experts / mean", xlabel="step", ylabel="layer x expert")
    figure.colorbar(shown)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in dict(
        steps=120,
        every=10,
        batch=16,
        length=64,
        hidden=64,
        heads=4,
        layers=2,
        experts=16,
        top_k=4,
        intermediate=64,
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--gamma", type=float, default=0.01, help="speed of the bias update")
    parser.add_argument("--alpha", type=float, default=1e-4, help="weight of the sequence-wise balance loss")
    parser.add_argument("--check", action="store_true", help="also train on one rank, and compare the losses")
    parser.add_argument("--plot", default="", help="picture to write, .png")
    return parser.parse_args()


def main():
    """Train, print the tables and write the picture. Exits with an error if --check finds different losses."""
    args = arguments()
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")  # for sum_over_ranks, and for the Communicator
    with moecomm.Communicator() as comm:

        def report(rows):
            if comm.rank == 0:
                _, loss, balance, share = (sum(column) / len(rows) for column in zip(*rows))
                print(f"{rows[-1][0]:>6}{loss:>10.4f}{balance:>16.2f}{100 * share:>16.1f}", flush=True)

        if comm.rank == 0:  # each line is the mean over the steps since the previous line
            print(
                f"{comm.size} ranks, {args.experts} experts in each of {args.layers} layers, "
                f"{args.batch * args.length} bytes per step"
            )
            print(f"{'step':>6}{'loss':>10}{'busiest/mean':>16}{'communication %':>16}")
        rows, loads = train(comm, args, report)
        if comm.rank:
            return
        print("\nload of the experts in the last quarter, 1 = mean")
        for layer, load in enumerate(loads[-max(1, args.steps // 4) :].mean(0)):
            print(f"  layer {layer}: " + " ".join(f"{v:.2f}" for v in (load / load.mean()).tolist()))
        alone = None
        if args.check:
            alone, _ = moecomm.run_local(lambda one: train(one, args), 1)[0]
            worst = max(abs(a[1] - b[1]) / b[1] for a, b in zip(rows, alone, strict=True))
            print(
                f"\nlosses of one rank: {alone[0][1]:.4f} -> {alone[-1][1]:.4f}; largest relative "
                f"difference at any step {worst:.1e}"
            )
            if worst > 2e-3:
                raise SystemExit("the losses differ by more than rounding errors")
        if args.plot:
            plot(args.plot, rows, loads, alone)
            print(f"written: {args.plot}")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
