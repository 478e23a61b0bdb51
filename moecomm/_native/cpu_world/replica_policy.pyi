"""Types of the module."""

class ReplicaPolicy:
    def __init__(
        self, physical_to_logical, experts: int, ranks: int, nodes: int, mode: int, activate: int
    ) -> None: ...
    @property
    def needs_all(self) -> bool: ...
