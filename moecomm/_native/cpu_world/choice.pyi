"""Types of the module."""

class Choice:
    def __init__(
        self, physical_to_logical, experts: int, ranks: int, nodes: int, mode: int, activate: int
    ) -> None: ...
    @property
    def needs_all(self) -> bool: ...
