"""Simulation of a cluster in one process: ranks of the sim world on a virtual clock, exploration and planner."""

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
