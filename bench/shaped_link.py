"""Time against the speed of the link between nodes: forwarding through gateways, and a direct all-to-all.

Nodes are network namespaces connected by a bridge. A token bucket filter of tc limits the rate of each node in both
directions. Both contenders have the same routing. In the direct all-to-all (gloo, with packing and sums of moecomm) a
token crosses the link once per destination *rank*; through gateways (UCX over tcp) once per destination *node*. The
ratio of the times should follow the ratio of the bytes. Needs root. If namespaces cannot be made, it prints why.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from moecomm import options

from . import cases, launch
from .measure import OWN, measure
from .run import progress_line
from .suite import RESULTS
from .world import World, join_gloo

STRAIGHT = "tuned-gloo"
_BURST, _QUEUE = "256kb", "200ms"


def arguments(parser):
    """Add the options of the command."""
    add = parser.add_argument
    add("--nodes", type=int, default=2, choices=(2, 3, 4), help="number of nodes")
    add("--ranks-per-node", type=options.ranks, default=4, help="ranks per node")
    add("--tokens", type=options.tokens, default=512, help="tokens per rank")
    add("--hidden", type=options.tokens, default=7168, help="elements of a token")
    add("--experts", type=options.count, default=0, help="experts over all ranks; 0: eight per rank")
    add("--top-k", type=options.ranks, default=8, help="picks per token")
    add("--gbits", type=options.numbers, default="1,2,4,8", help="link speeds in Gbit/s per direction")
    add("--iters", type=options.positive, default=5, help="timed iterations")
    add("--warmup", type=options.count, default=2, help="iterations before them")
    add(
        "--plot",
        type=options.file_to_write,
        default=str(RESULTS / "shaped_link.png"),
        metavar="FILE",
        help="picture to write",
    )
    add("--tag", default="", help="prefix of the namespaces; set by the command itself")


def main(args):
    """Make the links, start the ranks and print the table. The exit status is 0 if it must be skipped."""
    if launch.launched():
        return run_rank(args)
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return 0
    args.tag = f"moe{os.getpid()}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    try:
        build(args.tag, args.nodes)
        return start(args)
    finally:
        for name in [*(namespace(args.tag, n) for n in range(args.nodes)), f"{args.tag}-hub"]:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


# -- the links ---------------------------------------------------------------------------------------


def namespace(tag, node):
    """Name of the namespace of a node. Its only link is `uplink`."""
    return f"{tag}-{node}"


def why_not():
    """Reason why namespaces or limited links cannot be made, or None."""
    probe = f"moeprobe{os.getpid()}"
    try:
        ip("netns", "add", probe)
        try:
            ip("-n", probe, "link", "add", "uplink", "type", "veth", "peer", "name", "other")
            tc(probe, "uplink", "1gbit")
        finally:
            ip("netns", "del", probe)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


def ip(*words):
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def tc(name, device, rate):
    """Limit the rate at which a device of a namespace sends."""
    subprocess.run(
        [
            "tc",
            "-n",
            name,
            "qdisc",
            "replace",
            "dev",
            device,
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            _BURST,
            "latency",
            _QUEUE,
        ],
        check=True,
        capture_output=True,
        text=True,
    )


def build(tag, nodes):
    """Make a namespace per node, and one with the bridge between them."""
    hub = f"{tag}-hub"
    ip("netns", "add", hub)
    ip("-n", hub, "link", "add", "bridge", "type", "bridge")
    ip("-n", hub, "link", "set", "bridge", "up")
    for n in range(nodes):
        name = namespace(tag, n)
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "uplink", "type", "veth", "peer", "name", f"port{n}", "netns", hub)
        ip("-n", hub, "link", "set", f"port{n}", "master", "bridge")
        ip("-n", hub, "link", "set", f"port{n}", "up")
        ip("-n", name, "addr", "add", f"10.97.0.{n + 1}/24", "dev", "uplink")
        for device in ("lo", "uplink"):
            ip("-n", name, "link", "set", device, "up")


def shape(tag, nodes, gbits):
    """Limit the link of every node in both directions."""
    for n in range(nodes):
        tc(namespace(tag, n), "uplink", f"{gbits}gbit")
        tc(f"{tag}-hub", f"port{n}", f"{gbits}gbit")


# -- the ranks ---------------------------------------------------------------------------------------


def start(args):
    """Start all ranks in the namespaces of their nodes, as torchrun does; return the first bad exit status, or 0."""
    size = args.nodes * args.ranks_per_node
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        env = launch.environment(
            RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="10.97.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
            UCX_TLS="tcp",
            UCX_NET_DEVICES="uplink",
            GLOO_SOCKET_IFNAME="uplink",
            BENCH_PROGRESS=launch.terminal(),
        )
        ranks.append(
            subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    namespace(args.tag, rank // args.ranks_per_node),
                    *launch.program(),
                    *sys.argv[1:],
                    "--tag",
                    args.tag,
                ],
                env=env,
            )
        )
    try:
        return next((status for status in [rank.wait() for rank in ranks] if status), 0)
    finally:
        for rank in ranks:
            rank.kill()


def run_rank(args):
    """Measure all link speeds, as one rank; return 1 if a result is wrong."""
    join_gloo()
    world = World.from_torch()
    case = cases.Case(
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        tokens=args.tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        experts=args.experts or 8 * world.size,
    )
    say, rows = progress_line(world), []
    for gbits in args.gbits.split(","):
        if world.rank == 0:
            shape(args.tag, args.nodes, gbits)
        world.barrier()
        measured = measure(
            world,
            case,
            baselines=[STRAIGHT],
            iters=args.iters,
            warmup=args.warmup,
            progress=lambda text, gbits=gbits: say(f"{gbits} Gbit/s: {text}"),
        )
        rows.append(summary(float(gbits), measured))
    if world.rank == 0:
        say("")
        print(
            "\n".join(
                [
                    f"# {case.title()}",
                    f"# rail {measured.rail} over limited veth links; bytes over the links of all ranks, "
                    f"dispatch and combine",
                    *table(rows),
                ]
            )
        )
        plot(args.plot, rows, case)
        print(f"# written: {args.plot}")
    return 1 if sum(r["wrong"] for r in rows) else 0


def summary(gbits, measured):
    """Results of one link speed."""
    hops = measured.hops["roundtrip"]["rail"]
    return {
        "gbits": gbits,
        "forwarded_ms": measured.median(OWN, "roundtrip") / 1e3,
        "straight_ms": measured.median(STRAIGHT, "roundtrip") / 1e3,
        "forwarded_bytes": hops["physical_bytes"],
        "straight_bytes": measured.straight_bytes,
        "wrong": sum(sum(ops.values()) for ops in measured.wrong.values()),
    }


def table(rows):
    """Format the results as lines of text."""
    head = (
        f"# {'Gbit/s':>8} {'forwarded':>12} {'straight':>12} {'ratio':>7} "
        f"{'MB forwarded':>13} {'MB straight':>12} {'ratio':>7} {'time/bytes':>11} {'#wrong':>7}"
    )
    lines = [head, f"# {'':>8} {'ms':>12} {'ms':>12}"]
    for r in rows:
        time, size = r["straight_ms"] / r["forwarded_ms"], r["straight_bytes"] / r["forwarded_bytes"]
        lines.append(
            f"  {r['gbits']:8g} {r['forwarded_ms']:12.2f} {r['straight_ms']:12.2f} {time:7.2f} "
            f"{r['forwarded_bytes'] / 1e6:13.2f} "
            f"{r['straight_bytes'] / 1e6:12.2f} {size:7.2f} {time / size:11.2f} {r['wrong']:7d}"
        )
    return lines


def plot(path, rows, case):
    """Plot the times against the link speed, with the times of the bytes alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    speeds = [r["gbits"] for r in rows]
    for name, color in (("forwarded", "C0"), ("straight", "C1")):
        axis.plot(speeds, [r[f"{name}_ms"] for r in rows], "o-", color=color, label=f"{name}, measured")
        axis.plot(
            speeds,
            [r[f"{name}_bytes"] / case.nodes * 8e-6 / r["gbits"] for r in rows],
            "--",
            color=color,
            label=f"{name}, bytes alone",
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="link between nodes, Gbit/s each way",
        ylabel="dispatch + combine, ms (median)",
        title=f"{case.nodes} nodes x {case.ranks_per_node} ranks, {case.tokens} tokens of {case.row_bytes} bytes, "
        f"top-{case.top_k}",
    )
    axis.legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
