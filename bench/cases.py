"""Case: what one row of a benchmark is about, with its defaults, and the options that name it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecomm import options

from . import launch

DTYPES = ("bf16", "f16", "f32")
LAYOUTS = ("rank", "expert")
BASELINES = {"mpi": ("tuned-mpi",), "gloo": ("tuned-gloo", "torch-gloo"), "none": ()}


@dataclass(frozen=True)
class Case:
    """One routing and one buffer; `op` says which part of a round trip the row is about.

    tokens is per rank; masked is the share of picks that become -1; unbalanced gives rank r of R
    tokens * (r + 1) / R tokens; channels 0 leaves the choice to the library.
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
        """All ranks of the world."""
        return self.nodes * self.ranks_per_node

    @property
    def row_bytes(self):
        """Bytes of one row's payload."""
        return self.hidden * (4 if self.dtype == "f32" else 2)

    def tokens_of(self, rank):
        """Tokens that this rank dispatches."""
        return -(-self.tokens * (rank + 1) // self.ranks) if self.unbalanced else self.tokens

    def title(self):
        """One line that says everything."""
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


# What `make bench` runs: a layer of DeepSeek-V3's shape on two nodes with real text, and one node with even load.
FAMILIES = (
    Case(nodes=2, ranks_per_node=4, experts=256, groups=8, top_groups=4, routing="text"),
    Case(nodes=1, ranks_per_node=8),
)


def arguments(parser, case=Case()):
    """The options of a case and of its measurement."""
    add = parser.add_argument
    add("--nodes", type=options.ranks, help=f"default: {case.nodes}")
    add(
        "--ranks-per-node",
        type=options.ranks,
        help=f"default: as many as the launcher's ranks make, else {case.ranks_per_node}",
    )
    add("--tokens", type=options.tokens, default=case.tokens, help="per rank")
    add("--hidden", type=options.tokens, default=case.hidden)
    add("--experts", type=options.ranks, default=case.experts, help="over all ranks")
    add("--top-k", type=options.ranks, default=case.top_k)
    add("--groups", type=options.ranks, default=case.groups, help="consecutive groups of experts")
    add(
        "--top-groups",
        type=options.ranks,
        default=case.top_groups,
        help="groups that a token's experts come from",
    )
    add(
        "--routing",
        type=options.source("uniform", "zipf", "text"),
        default=case.routing,
        help="uniform | zipf | text | the folder of a recording | FILE (.npy or .npz of ids, or any text)",
    )
    add("--masked", type=options.share, default=case.masked, help="share of picks that are -1")
    add("--unbalanced", action="store_true", help="rank r of R has (r + 1) / R of the tokens")
    add("--dtype", choices=DTYPES, default=case.dtype)
    add("--layout", choices=LAYOUTS, default=case.layout)
    add("--channels", type=options.count, default=case.channels, help="0: chosen by the library")
    measurement(parser)


def measurement(parser):
    """The options of a measurement, whatever is measured."""
    add = parser.add_argument
    add(
        "--baseline",
        type=options.some_of(*BASELINES),
        default="gloo,mpi",
        help="comma-separated: mpi, gloo, none",
    )
    add("--iters", type=options.positive, default=20)
    add("--warmup", type=options.count, default=3)
    add("--json", type=options.file_to_write, metavar="FILE", help="append one JSON object per case")
    add("--csv", type=options.file_to_write, metavar="FILE", help="append one CSV row per case")
    add("--plot", type=options.file_to_write, metavar="FILE", help="a PNG chart of the cases")


def from_args(args, op):
    """The case that parsed options describe."""
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
    """Names of the baselines that a --baseline option asks for."""
    return [name for key in ("mpi", "gloo") if key in text.split(",") for name in BASELINES[key]]
