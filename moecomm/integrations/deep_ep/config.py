"""Config: deep_ep's tuning parameters of a call.

They are checked and stored, but have no effect: moecomm chooses its own chunk sizes.
"""

from __future__ import annotations

from typing import Any

from .errors import refuse

_RANKS_PER_NODE = 8  # deep_ep assumes this number to decide whether ranks are on several nodes


class Config:
    """Multiprocessors and chunk sizes of dispatch or combine, with deep_ep's names.

    Parameters
    ----------
    num_sms : int
        An even number. See Buffer.set_num_sms for the multiprocessors of kernels.
    num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens, num_max_rdma_chunked_send_tokens,
    num_max_rdma_chunked_recv_tokens : int
        Positive. For each link, send must be less than recv.

    Raises
    ------
    InvalidArgument
        A number is out of range.
    """

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: Any = 6,
        num_max_nvl_chunked_recv_tokens: Any = 256,
        num_max_rdma_chunked_send_tokens: Any = 6,
        num_max_rdma_chunked_recv_tokens: Any = 256,
    ) -> None:
        self.num_sms = _positive("num_sms", num_sms)
        self.num_max_nvl_chunked_send_tokens = _positive(
            "num_max_nvl_chunked_send_tokens", num_max_nvl_chunked_send_tokens
        )
        self.num_max_nvl_chunked_recv_tokens = _positive(
            "num_max_nvl_chunked_recv_tokens", num_max_nvl_chunked_recv_tokens
        )
        self.num_max_rdma_chunked_send_tokens = _positive(
            "num_max_rdma_chunked_send_tokens", num_max_rdma_chunked_send_tokens
        )
        self.num_max_rdma_chunked_recv_tokens = _positive(
            "num_max_rdma_chunked_recv_tokens", num_max_rdma_chunked_recv_tokens
        )
        if num_sms % 2:
            refuse("Config", f"num_sms is {num_sms}; expected an even number")
        for link in ("nvl", "rdma"):
            send, receive = (
                getattr(self, f"num_max_{link}_chunked_{way}_tokens") for way in ("send", "recv")
            )
            if send >= receive:
                refuse(
                    "Config",
                    f"num_max_{link}_chunked_send_tokens is {send}; expected less than "
                    f"num_max_{link}_chunked_recv_tokens = {receive}",
                )

    def get_nvl_buffer_size_hint(self, hidden_bytes: Any, num_ranks: Any) -> Any:
        """Return bytes for num_nvl_bytes: the rows in flight inside a node."""
        peers = min(_positive("num_ranks", num_ranks), _RANKS_PER_NODE)
        return self._size(hidden_bytes, peers, self.num_max_nvl_chunked_recv_tokens)

    def get_rdma_buffer_size_hint(self, hidden_bytes: Any, num_ranks: Any) -> Any:
        """Return bytes for num_rdma_bytes: the rows in flight between nodes, or 0 if one node has all ranks."""
        if _positive("num_ranks", num_ranks) <= _RANKS_PER_NODE:
            return 0
        return self._size(
            hidden_bytes, -(-num_ranks // _RANKS_PER_NODE), 2 * self.num_max_rdma_chunked_recv_tokens
        )

    def _size(self, hidden_bytes: Any, peers: Any, rows: Any) -> Any:
        row = _positive("hidden_bytes", hidden_bytes) + 512  # ids, weights, scales
        return -(-(self.num_sms // 2) * peers * rows * row // 128) * 128

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in vars(self).items())})"


def _positive(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse("Config", f"{name} is {value!r}; expected an int > 0")
    return value
