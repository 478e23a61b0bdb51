"""Types of the module."""

from .replica_policy import ReplicaPolicy

class ReplicaRequest:
    def __init__(self, policy: ReplicaPolicy, routing: int, slots, counted) -> None: ...
