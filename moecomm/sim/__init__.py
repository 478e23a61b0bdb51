"""A cluster on a laptop: ranks of the sim world with virtual time, and what is built on it (exploration, planner)."""

from .program import MODES, Choosing, Program
from .world import (
    DECODE_LEAD_NS,
    LEAD_NS,
    RATES,
    SCHEDULES,
    STRICT_TOKENS,
    Cluster,
    Hardware,
    Step,
    describe_waiting,
)

__all__ = [
    "DECODE_LEAD_NS",
    "LEAD_NS",
    "MODES",
    "RATES",
    "SCHEDULES",
    "STRICT_TOKENS",
    "Choosing",
    "Cluster",
    "Hardware",
    "Program",
    "Step",
    "describe_waiting",
]
