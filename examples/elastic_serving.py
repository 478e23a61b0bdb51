"""A small MoE serves while ranks are killed and new ones join.

    python examples/elastic_serving.py --seconds 20 --png serving.png

The parent process starts the ranks, kills some with SIGKILL, starts new ones, and shows the reports of the ranks:
tokens per second, number of ranks, and the share of the routing weight whose experts are lost. See docs/elastic.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import moecomm

HIDDEN, INNER, EXPERTS, TOP_K, BATCH = 256, 512, 16, 4, 64
EVENTS = ("kill", "join", "kill", "join")  # at equal intervals


class Experts:
    """The experts in the slots of this rank. A real server would load them from a checkpoint."""

    def __init__(self, ids):
        self.weights = {int(e): self.load(int(e)) for e in ids}

    @staticmethod
    def load(expert):
        g = torch.Generator().manual_seed(expert)
        return torch.randn(HIDDEN, INNER, generator=g) / 16, torch.randn(INNER, HIDDEN, generator=g) / 23

    def __call__(self, x, ids, counts):
        parts = zip(ids.tolist(), x.float().split(counts.tolist()), strict=True)
        done = [torch.relu(rows @ self.weights[e][0]) @ self.weights[e][1] for e, rows in parts]
        return torch.cat(done).to(x.dtype)


def enter(address):
    """Start or join: (comm, buf, expert ids of this rank's slots, Experts). An empty address starts a new world."""
    if address:
        comm = moecomm.Communicator.join(address, timeout=60)
        arguments = comm.offered[0]
        table = arguments["placement"].physical_to_logical[0]
    else:
        comm = moecomm.Communicator(ranks_per_node=2, timeout=60)
        arguments = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=BATCH, renormalize=True)
        table = torch.arange(EXPERTS)
    mine = table.view(comm.size, -1)[comm.rank]
    experts, buf = Experts(mine), moecomm.Buffer(comm, **arguments)
    if address:
        comm.admit()  # waits until the other ranks admit this one
    return comm, buf, mine, experts


def serve(folder, address):
    """Run one rank: answer requests until the step after which the parent stops all ranks."""
    torch.set_num_threads(1)
    for attempt in range(5):
        try:
            comm, buf, mine, experts = enter(address)
            break
        except moecomm.PeerLost:  # a rank died while this one joined, or all ranks have stopped
            if (Path(folder) / "stop").exists():
                return
            if not address or attempt == 4:
                raise
            time.sleep(0.5)
    router = torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(0)) / 16
    requests = torch.Generator().manual_seed(comm.members[comm.rank])
    stop = Path(folder) / "stop"
    while not (stop.exists() and comm.steps >= int(stop.read_text() or 1 << 60)):
        x = torch.randn(BATCH, HIDDEN, generator=requests).bfloat16()
        weights, ids = (x.float() @ router).softmax(-1).topk(TOP_K)

        def step(x=x, ids=ids, weights=weights):
            out = buf.dispatch(x, ids, weights)
            y = buf.combine(
                experts(out.x, mine, out.tokens_per_expert), out.handle, topk_weights=out.topk_weights
            )
            return y, out.lost_weight

        answers, lost = comm.retry(step)
        assert answers.isfinite().all()
        comm.admit()
        share = 0.0 if lost is None else float(lost.sum() / weights.sum())
        report = {
            "t": time.monotonic(),
            "tokens": BATCH,
            "ranks": comm.size,
            "lost": share,
            "step": comm.steps,
        }
        print(json.dumps({**report, "address": comm.address}), flush=True)
    comm.close()


class Ranks:
    """The serving processes, and their reports."""

    def __init__(self, size, folder):
        self.folder, self.reports, self.processes = folder, [], []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(size):
            self.start(
                RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, MOECOMM_GROUP="env"
            )

    def start(self, address="", **environment):
        """Start one more process."""
        command = [sys.executable, __file__, "--serve", str(self.folder), "--address", address]
        env = {**os.environ, **{k: str(v) for k, v in environment.items()}}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        self.processes.append(process)
        threading.Thread(target=self.listen, args=(process,), daemon=True).start()

    def listen(self, process):
        """Store every report of a process."""
        for line in process.stdout:
            self.reports.append(json.loads(line))

    def event(self, kind):
        """Kill the oldest running process, or start a new one."""
        living = [p for p in self.processes if p.poll() is None]
        if kind == "kill":
            living[0].send_signal(signal.SIGKILL)
        else:
            self.start(self.reports[-1]["address"])

    def finish(self):
        """Stop all ranks after the same step; return the exit statuses of the ranks that were not killed."""
        part = self.folder / "stop.part"
        part.write_text(str(max(s["step"] for s in self.reports[-64:]) + 50))
        part.rename(self.folder / "stop")
        survivors = [p for p in self.processes if p.poll() != -signal.SIGKILL]
        try:
            return [p.wait(60) for p in survivors]
        finally:
            for p in survivors:
                p.kill()


def window(reports, end, seconds=1.0):
    """(tokens per second, ranks, lost share) of the reports in the last seconds before `end`."""
    recent = [s for s in list(reports) if end - seconds < s["t"] <= end]
    if not recent:
        return 0.0, 0, 0.0
    return (
        sum(s["tokens"] for s in recent) / seconds,
        recent[-1]["ranks"],
        sum(s["lost"] for s in recent) / len(recent),
    )


def draw(path, reports, events, begin, end):
    """Write a picture of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [begin + 0.25 * i for i in range(1, int((end - begin) / 0.25))]
    columns = list(zip(*(window(reports, t, 0.5) for t in times), strict=True))
    figure, rows = pyplot.subplots(3, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for axes, column, name in zip(rows, columns, ("tokens/s", "ranks", "lost weight"), strict=True):
        axes.plot([t - begin for t in times], column)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        for when, kind in events:
            axes.axvline(when - begin, color="crimson" if kind == "kill" else "seagreen", lw=0.8)
    rows[-1].set_xlabel("seconds (red: kill -9, green: a new rank starts)")
    figure.savefig(path, dpi=130)


def main():
    """Run the example; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="ranks at the start")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the run")
    parser.add_argument("--png", help="picture of the run to write (needs matplotlib)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.address)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ranks, events = Ranks(args.ranks, Path(folder)), []
        # Wait for the first reports.
        while len(ranks.reports) < args.ranks and all(p.poll() is None for p in ranks.processes):
            time.sleep(0.05)
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + args.seconds:
            due = int((now - begin) / args.seconds * (len(EVENTS) + 1))
            if due > len(events):
                kind = EVENTS[len(events)]
                ranks.event(kind)
                events.append((now, kind))
                print(f"\n{now - begin:5.1f} s  {kind}")
            speed, size, lost = window(ranks.reports, now)
            print(
                f"\r{now - begin:5.1f} s  {size} ranks  {speed:8.0f} tokens/s  {lost:6.1%} lost",
                end="",
                flush=True,
            )
            time.sleep(0.1)
        end = time.monotonic()
        statuses = ranks.finish()
        served = sum(s["tokens"] for s in ranks.reports)
        print(f"\n{served} tokens served, {len(events)} events, exit statuses of the survivors {statuses}")
        if args.png:
            draw(args.png, ranks.reports, events, begin, end)
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
