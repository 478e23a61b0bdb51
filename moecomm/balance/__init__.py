"""Load balancing with redundant experts: which rank holds which expert, and which replica serves which token.

A *logical expert* is what the gate picks. An *expert slot* is a place for the weights of one expert on a rank; slot p
of P belongs to rank p // (P / ranks). A placement says which logical expert each slot holds. An expert in several
slots has several replicas.
"""

from .budget import Paid
from .migration import migrate
from .monitor import Advice, LoadMonitor
from .eplb import rebalance_experts
from .placement import Placement, rebalance
from .prefetch import prefetch

__all__ = [
    "Advice",
    "LoadMonitor",
    "Paid",
    "Placement",
    "migrate",
    "prefetch",
    "rebalance",
    "rebalance_experts",
]
