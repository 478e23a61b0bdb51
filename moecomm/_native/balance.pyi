import numpy as np

def rebalance(load: np.ndarray, placement: np.ndarray, groups: int, nodes: int, ranks: int,
              previous: np.ndarray | None = ..., max_moves: int = ..., connected: bool = ...) -> None: ...
