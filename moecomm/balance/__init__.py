"""Balance: redundant experts, where they live, and how a batch's tokens are spread over them.

A *logical* expert is what the gate picks. A *physical* expert is a slot of a rank; slot p of P belongs to rank
p // (P / ranks). A placement says which logical expert every slot holds; an expert in several slots is replicated.
"""

from .migration import migrate
from .monitor import Advice, LoadMonitor
from .placement import Placement, rebalance, rebalance_experts

__all__ = ["Advice", "LoadMonitor", "Placement", "migrate", "rebalance", "rebalance_experts"]
