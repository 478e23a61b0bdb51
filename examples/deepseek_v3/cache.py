"""KV cache of decoding: the compressed latent and the rotated shared key per layer and token, nothing per head."""

from __future__ import annotations

import torch

from moecomm.errors import CapacityExceeded, InvalidArgument

from .config import Config


class Cache:
    """KV cache of `slots` requests with at most `max_length` tokens each.

    The rows of one request and layer are contiguous, so they can be sent without a copy. Rows from lengths[slot] on
    are not read: to remove tokens, such as those of a rejected draft, reduce the length.

    Parameters
    ----------
    config : Config
    slots, max_length : int
        Number of requests, and tokens per request.
    dtype : torch.dtype
    data : Tensor, optional
        Memory to use. Default: new memory.

    Attributes
    ----------
    data : Tensor [layers (+ 1 for MTP), slots, max_length, kv_rank + rope]
    lengths : Tensor int64 [slots]
        Tokens of each request in the cache.

    Raises
    ------
    InvalidArgument
        data has another shape.
    """

    def __init__(
        self,
        config: Config,
        slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        data: torch.Tensor | None = None,
    ) -> None:
        shape = (config.layers + config.mtp, slots, max_length, config.cache_width)
        if data is not None and tuple(data.shape) != shape:
            raise InvalidArgument(f"data has shape {list(data.shape)}; expected {list(shape)}", op="Cache")
        self.data = torch.zeros(shape, dtype=dtype) if data is None else data
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self._free = list(range(slots))[::-1]

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a slot."""
        return self.data.shape[2]

    def allocate(self) -> int:
        """Allocate an empty slot and return its index.

        Raises
        ------
        CapacityExceeded
            All slots are in use.
        """
        if not self._free:
            raise CapacityExceeded(
                f"all {len(self.lengths)} slots are in use; free one, or make a Cache with more slots",
                op="Cache",
            )
        slot = self._free.pop()
        self.lengths[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Free a slot."""
        if slot in self._free or not 0 <= slot < len(self.lengths):
            raise InvalidArgument(f"slot is {slot}; expected a slot in use", op="Cache")
        self._free.append(slot)
        self.lengths[slot] = 0

    def write(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Store rows [B, S, width] at positions [B, S] of slots [B]; return all rows up to the last position.

        Position -1 marks padding, which is not stored. The result is [B, L, width].
        """
        if not positions.numel():
            return rows
        real = positions >= 0
        where = slots[:, None].expand_as(positions)[real], positions[real]
        self.data[layer].index_put_(where, rows[real].to(self.data.dtype))
        last = int(positions.max()) + 1
        kept = self.data[layer, slots, :last].to(rows.dtype)
        # Missing rows get weight 0, but 0 * NaN is NaN, and `data` may contain anything there.
        missing = torch.arange(last) > positions.max(1).values[:, None]
        return kept.masked_fill(missing[..., None], 0)
