"""Types of the module."""

from ..shared.status import Failure
from .calls import Calls
from .counts import Counts
from .decode_area import DecodeArea
from .peer_access import PeerAccess

class Decode:
    def __init__(
        self,
        geometry,
        peer_access: PeerAccess,
        calls: Calls,
        device: int,
        hidden,
        dtype,
        num_experts,
        top_k,
        max_tokens,
        check: bool,
        spread,
        stages: int,
        timeout: float,
    ) -> None: ...
    def contact(self) -> bytes: ...
    def connect(self, contacts: list) -> None: ...
    def area(self, name: str, bank: int) -> DecodeArea: ...
    def window(self) -> tuple[int, int]: ...
    @property
    def scale_area(self) -> int: ...
    def rest(self) -> tuple[int, int]: ...
    def mask(self, masked: list[int], latest: int, calls: int) -> None: ...
    @property
    def epoch(self) -> int: ...
    def dispatch(
        self,
        x: int,
        scales: int,
        ids: int,
        ids_are_int32: bool,
        weights: int,
        weighted: bool,
        tokens: int,
        quant: int,
        by_column: bool,
        receive: bool,
        stream: int,
    ) -> Failure | None: ...
    def dispatch_receive(self, epoch: int, stream: int) -> Failure | None: ...
    def combine(
        self,
        epoch: int,
        rows: int,
        ids: int,
        ids_are_int32: bool,
        weights: int,
        wire: int,
        y: int,
        receive: bool,
        stream: int,
    ) -> Failure | None: ...
    def combine_receive(self, epoch: int, stream: int) -> Failure | None: ...
    def refuse(self, verb: str, epoch: int, why: int, stream: int) -> Failure | None: ...
    def fault(self) -> Failure | None: ...
    def ended(self) -> Failure | None: ...
    def stage(self, epoch: int, stream: int) -> int: ...
    def counters(self) -> Counts: ...
    def take_counters(self) -> dict: ...
