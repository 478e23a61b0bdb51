"""Types of the module."""

class Block:
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
