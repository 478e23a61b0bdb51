"""Types of the module."""

import torch

class Block:
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def tensor(self, offset: int, code: int, bits: int, rows: int, columns: int) -> torch.Tensor | None: ...
