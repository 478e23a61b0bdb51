"""Predicted cost of the verbs of moecomm.fabric on a cluster: the same roles run on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .._native import sim as native
from ..checks import integer, require
from .world import Hardware

_MULTICAST, _REDUCE = 0, 1  # of SimDomainVerb in csrc/runtime/sim/domain.hpp


@dataclass(frozen=True)
class Price:
    """Cost of a request.

    Attributes
    ----------
    seconds : float
        From the start until the last rank has finished.
    rail_bytes, node_bytes : int
        Bytes of rows that all ranks send over the rail and inside nodes.
    """

    seconds: float
    rail_bytes: int
    node_bytes: int


class FabricCluster:
    """A cluster that predicts the cost of requests.

    Parameters
    ----------
    size, ranks_per_node : int
        Number of ranks, and of ranks per node.
    hardware : Hardware, optional
        Rates and delays. Default: H800 nodes.

    Raises
    ------
    InvalidArgument
        A number is out of range, or ranks_per_node does not divide size.
    """

    def __init__(self, size: int, *, ranks_per_node: int, hardware: Hardware | None = None) -> None:
        op = "FabricCluster"
        self.size = integer(op, "size", size, 1, 1 << 16)
        self.ranks_per_node = integer(op, "ranks_per_node", ranks_per_node, 1, self.size)
        require(
            self.size % self.ranks_per_node == 0, op, "ranks_per_node", ranks_per_node, "a divisor of size"
        )
        require(hardware is None or isinstance(hardware, Hardware), op, "hardware", hardware, "a Hardware")
        self.hardware = hardware or Hardware()

    def multicast(self, ranks: Sequence[int], nbytes: int, *, root: int = 0) -> Price:
        """Predict Domain.multicast of nbytes from root to ranks.

        Raises
        ------
        InvalidArgument
            A rank does not exist or occurs twice, or nbytes is out of range.
        """
        return self._price("multicast", _MULTICAST, ranks, nbytes, root)

    def reduce(self, ranks: Sequence[int], nbytes: int, *, root: int = 0) -> Price:
        """Predict Domain.reduce of float32 rows of nbytes from ranks to root.

        Raises
        ------
        InvalidArgument
            A rank does not exist or occurs twice, or nbytes is out of range.
        """
        return self._price("reduce", _REDUCE, ranks, nbytes, root)

    def _price(self, op: str, verb: int, ranks: Sequence[int], nbytes: int, root: int) -> Price:
        size = integer(op, "nbytes", nbytes, 4, 1 << 32)
        root = integer(op, "root", root, 0, self.size - 1)
        found = sorted(integer(op, "ranks", r, 0, self.size - 1) for r in ranks)
        require(len(set(found)) == len(found), op, "ranks", ranks, "distinct ranks")
        require(bool(found), op, "ranks", ranks, "at least one rank")
        size = -(-size // 64) * 64
        cluster = native.DomainCluster(self.size, self.ranks_per_node, 2 * size, asdict(self.hardware), False)
        (times,) = cluster.run([(verb, 0, [(root, found, 0, size, size, 1)])])
        wrong = [(rank, code) for rank, (_, _, code, _) in enumerate(times) if code != "ok"]
        assert not wrong, f"{op}: simulated ranks ended with {wrong}"
        links = [cluster.links(r) for r in range(self.size)]
        span = max(end for _, end, _, _ in times) - min(begin for begin, _, _, _ in times)
        return Price(span * 1e-12, sum(rail for rail, _ in links), sum(node for _, node in links))
