import numpy as np

def rebalance(
    load: np.ndarray,
    placement: np.ndarray,
    groups: int,
    nodes: int,
    ranks: int,
    previous: np.ndarray | None = ...,
    max_moves: int = ...,
    connected: bool = ...,
) -> object: ...
def prefetch(
    load: np.ndarray, table: np.ndarray, nodes: int, spare: int, most: int, placement: np.ndarray
) -> object: ...

class Replicas:
    experts: int
    ranks: int
    count: int
    def __init__(self, physical_to_logical: np.ndarray, experts: int, ranks: int, nodes: int) -> None: ...
    @property
    def first(self) -> object: ...
    @property
    def slot(self) -> object: ...
    @property
    def rank(self) -> object: ...
    def split(
        self, load: np.ndarray, share: np.ndarray, active: np.ndarray | None = ..., rounds: int = ...
    ) -> object: ...
    def runs(
        self, total: np.ndarray, share: np.ndarray, turn: int, first: np.ndarray, last: np.ndarray
    ) -> object: ...
    def activate(self, load: np.ndarray, limit: int, active: np.ndarray) -> object: ...
