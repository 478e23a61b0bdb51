"""Case: parameters of one row of a benchmark, with defaults and command-line options."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecomm import options

from . import launch, rivals

DTYPES = ("bf16", "f16", "f32")
LAYOUTS = ("rank", "expert")
# `rivals` run in a separate environment, and only if all ranks run in it.
BASELINES = {
    "mpi": ("tuned-mpi",),
    "gloo": ("tuned-gloo", "torch-gloo"),
    "rivals": rivals.NAMES,
    "none": (),
}


@dataclass(frozen=True)
class Case:
    """One routing and one Buffer. `op` is the measured part of a round trip.

    tokens is per rank. masked is the share of picks that are -1. With unbalanced, rank r of R has tokens * (r + 1) /
    R tokens. With channels 0 the library chooses.
    """

    op: str = "roundtrip"
    nodes: int = 1
    ranks_per_node: int = 8
    tokens: int = 512
    hidden: int = 7168
    experts: int = 64
    top_k: int = 8
    groups: int = 1
    top_groups: int = 1
    routing: str = "uniform"
    masked: float = 0.0
    unbalanced: bool = False
    dtype: str = "bf16"
    layout: str = "rank"
    channels: int = 0

    @property
    def ranks(self):
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def row_bytes(self):
        """Bytes of the payload of one row."""
        return self.hidden * (4 if self.dtype == "f32" else 2)

    def tokens_of(self, rank):
        """Number of tokens of a rank."""
        return -(-self.tokens * (rank + 1) // self.ranks) if self.unbalanced else self.tokens

    def title(self):
        """Describe the case on one line."""
        groups = f" in {self.top_groups} of {self.groups} groups" if self.groups > 1 else ""
        extra = (f", {self.masked:.0%} masked" if self.masked else "") + (
            ", unbalanced" if self.unbalanced else ""
        )
        return (
            f"{self.ranks} ranks = {self.nodes} node{'s' * (self.nodes > 1)} x {self.ranks_per_node}, "
            f"{self.tokens} tokens per rank, "
            f"hidden {self.hidden} {self.dtype}, {self.experts} experts, top-{self.top_k}{groups}, "
            f"{self.routing} routing{extra}, {self.layout} layout"
        )


# Cases of `make bench`: a layer of DeepSeek-V3's shape on two nodes with real text, and one node with an even load.
FAMILIES = (
    Case(nodes=2, ranks_per_node=4, experts=256, groups=8, top_groups=4, routing="text"),
    Case(nodes=1, ranks_per_node=8),
)


def arguments(parser, case=Case()):
    """Add the options of a case and of its measurement."""
    add = parser.add_argument
    add("--nodes", type=options.ranks, help=f"number of nodes; default: {case.nodes}")
    add(
        "--ranks-per-node",
        type=options.ranks,
        help=f"default: from the number of launched ranks, else {case.ranks_per_node}",
    )
    add("--tokens", type=options.tokens, default=case.tokens, help="tokens per rank")
    add("--hidden", type=options.tokens, default=case.hidden, help="elements of a token")
    add("--experts", type=options.ranks, default=case.experts, help="experts over all ranks")
    add("--top-k", type=options.ranks, default=case.top_k, help="picks per token")
    add("--groups", type=options.ranks, default=case.groups, help="consecutive groups of experts")
    add(
        "--top-groups",
        type=options.ranks,
        default=case.top_groups,
        help="number of groups from which the experts of a token come",
    )
    add(
        "--routing",
        type=options.source("uniform", "zipf", "text"),
        default=case.routing,
        help="uniform, zipf, text, the folder of a recording, or a file (.npy or .npz with ids, or text)",
    )
    add("--masked", type=options.share, default=case.masked, help="share of picks that are -1")
    add("--unbalanced", action="store_true", help="rank r of R has (r + 1) / R of the tokens")
    add("--dtype", choices=DTYPES, default=case.dtype, help="dtype of the rows")
    add("--layout", choices=LAYOUTS, default=case.layout, help="layout of the received rows")
    add("--channels", type=options.count, default=case.channels, help="0: the library chooses")
    measurement(parser)


def measurement(parser):
    """Add the options of any measurement."""
    add = parser.add_argument
    add(
        "--baseline",
        type=options.some_of(*BASELINES),
        default="gloo,mpi",
        help="comma-separated list of mpi, gloo, rivals (Intel MPI and oneCCL), none",
    )
    add("--cold", action="store_true", help="evict the caches before every call")
    add("--iters", type=options.positive, default=20, help="timed iterations")
    add("--warmup", type=options.count, default=3, help="iterations before them")
    add("--json", type=options.file_to_write, metavar="FILE", help="append one JSON object per case")
    add("--csv", type=options.file_to_write, metavar="FILE", help="append one CSV row per case")
    add("--plot", type=options.file_to_write, metavar="FILE", help="write a PNG chart of the cases")


def from_args(args, op):
    """Make the Case of the parsed options."""
    fields = {name: getattr(args, name) for name in Case.__dataclass_fields__ if name != "op"}
    default, ranks = Case(), launch.launched()
    if fields["nodes"] is None:
        fields["nodes"] = (
            ranks // fields["ranks_per_node"] if ranks and fields["ranks_per_node"] else default.nodes
        )
    if fields["ranks_per_node"] is None:
        fields["ranks_per_node"] = ranks // fields["nodes"] if ranks else default.ranks_per_node
    return replace(default, op=op, **fields)


def baselines_of(text):
    """Names of the baselines of a --baseline option."""
    return [name for key in BASELINES if key in text.split(",") for name in BASELINES[key]]
