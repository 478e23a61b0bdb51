"""Configuration of the server: model, ranks and options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

import torch

from moecomm import InvalidArgument

from ..config import MINI, Config, Yarn

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
POLICIES = ("load", "shuffle")


@dataclass(frozen=True)
class UnitShape:
    """Geometry of a unit.

    Attributes
    ----------
    ranks, ranks_per_node : int
    redundant : int
        Redundant expert slots per rank.
    attention_tp : int
        Ranks that compute the attention of the same sequences, each with a part of the heads and of the tokens.
    """

    ranks: int
    ranks_per_node: int
    redundant: int = 1
    attention_tp: int = 1

    @property
    def groups(self):
        """Number of data-parallel groups: sets of ranks that serve the same sequences."""
        return self.ranks // self.attention_tp


@dataclass(frozen=True)
class ServeConfig:
    """Configuration that the router and all ranks share.

    Attributes
    ----------
    model : Config
    prefill, decode : UnitShape
        Geometry of the units.
    slots : int
        Sequences per decode rank, or per group of ranks with the same sequences.
    max_len : int
        Tokens of a sequence, including the prompt.
    prefill_tokens : int
        Tokens of a prefill rank or group in one batch. A longer prompt gets a batch of its own.
    speculative : bool
        The MTP module drafts one token.
    rebalance_seconds : float
        Time between two placements. 0: never rebalance.
    policy : "load" or "shuffle"
        "load": rebalance by the counted load. "shuffle": random placements, for tests.
    dtype : str
        Dtype of the model and of its rows.
    seed : int
        Seed of the parameters, if there is no checkpoint.
    checkpoint : str or None
        A folder that train.py has saved, or a file with a state_dict of Model that torch.load reads.
    timeout : float
        Timeout of every wait, in seconds.

    In float64, the order of a sum changes a logit by about 1e-15, and two candidates for a token are hardly ever that
    close. So the tokens equal those of one process, independently of batches and placement. In narrower types the
    tokens may differ, with the same quality.
    """

    model: Config = MINI
    prefill: UnitShape = field(default_factory=lambda: UnitShape(2, 1))
    decode: UnitShape = field(default_factory=lambda: UnitShape(4, 2))
    slots: int = 8
    max_len: int = 160
    prefill_tokens: int = 256
    speculative: bool = True
    rebalance_seconds: float = 3.0
    policy: str = "load"
    dtype: str = "float64"
    seed: int = 0
    checkpoint: str | None = None
    timeout: float = 30.0

    def __post_init__(self):
        """Refuse values that contradict each other, before a process is started."""
        if self.dtype not in DTYPES:
            raise InvalidArgument(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}", op="serve")
        if self.policy not in POLICIES:
            raise InvalidArgument(
                f"policy is {self.policy!r}; expected one of {', '.join(POLICIES)}", op="serve"
            )
        for name in ("slots", "max_len", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is {getattr(self, name)}; expected 1 or more", op="serve")
        for name, unit, experts in (
            ("prefill", self.prefill, self.model.num_experts),
            ("decode", self.decode, self.model.num_experts + self.shared_pick),
        ):
            slots = slots_of(unit, experts)
            if unit.ranks < 1 or unit.ranks % unit.ranks_per_node or slots > experts * unit.ranks:
                raise InvalidArgument(
                    f"{name} is {unit}; expected a multiple of ranks_per_node, and at most {experts} expert slots "
                    "per rank",
                    op="serve",
                )
            tp, heads = unit.attention_tp, self.model.heads
            if tp < 1 or unit.ranks % tp or heads % tp:
                raise InvalidArgument(
                    f"{name}.attention_tp is {tp}; expected a divisor of the {unit.ranks} ranks and of the {heads} "
                    "heads",
                    op="serve",
                )
        if self.speculative and not self.model.mtp:
            raise InvalidArgument("speculative is True; expected a model with an MTP module", op="serve")

    @property
    def vocabulary(self):
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def shared_pick(self):
        """Whether the decode unit routes the shared expert as one more pick. It must have the size of a routed one."""
        return self.model.shared_experts == 1

    @property
    def torch_dtype(self):
        """The dtype as torch.dtype."""
        return DTYPES[self.dtype]

    def to_json(self):
        """Convert to types that JSON supports."""
        return asdict(self)

    @staticmethod
    def from_json(values):
        """Make a ServeConfig from the result of to_json."""
        values = dict(values)
        yarn = values["model"].get("yarn")
        values["model"] = Config(**{**values["model"], "yarn": yarn and Yarn(**yarn)})
        for unit in ("prefill", "decode"):
            values[unit] = UnitShape(**values[unit])
        return ServeConfig(**{f.name: values[f.name] for f in fields(ServeConfig)})


def slots_of(unit, experts):
    """Expert slots of a unit: for each rank an even share, rounded up, plus the redundant slots."""
    return unit.ranks * (-(-experts // unit.ranks) + unit.redundant)
