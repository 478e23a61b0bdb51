"""The oracle: dispatch and combine of all ranks in slow, obvious torch code, for tests to compare with.

Arguments and results of all ranks are lists indexed by rank; nothing is sent. dispatch and combine of moecomm must
equal the oracle bit for bit, because it rounds where the protocol rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Received:
    """Result of a dispatch on one rank.

    Attributes
    ----------
    x : Tensor [N, hidden]
    scales : Tensor [N, hidden/128] or None
    topk_weights : Tensor float32 [N] (expert layout) or [N, top_k] (rank layout)
    topk_ids : Tensor int64 [N, top_k] (rank layout), else None
    tokens_per_expert, rows_per_expert : Tensor int64 [experts per rank]
        Rows of each expert without and with padding.
    source_rank, source_token : Tensor int64 [N]
        -1 on padding.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    rows_per_expert: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor


def dispatch(
    xs: Sequence[torch.Tensor],
    topk_ids: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor] | None = None,
    *,
    num_experts: int,
    layout: str = "expert",
    expert_alignment: int = 1,
    capacity: int | None = None,
    scales: Sequence[torch.Tensor] | None = None,
) -> list[Received]:
    """Compute what every rank receives from Buffer.dispatch.

    Parameters
    ----------
    xs, topk_ids : list of Tensor [T, hidden], [T, top_k], by rank
    topk_weights : list of Tensor [T, top_k] by rank, optional
        Default: ones.
    scales : list of Tensor [T, hidden/128] by rank, optional
    num_experts, layout, expert_alignment, capacity
        As for Buffer and Buffer.dispatch.

    Returns
    -------
    list of Received
        By rank. Rows are ordered by (local expert, source rank, source token) in the expert layout, and by (source
        rank, source token) in the rank layout.
    """
    size, top_k = len(xs), topk_ids[0].shape[1]
    per_rank = num_experts // size
    if topk_weights is None:
        topk_weights = [torch.ones(ids.shape, dtype=torch.float32, device="cpu") for ids in topk_ids]
    out = []
    for rank in range(size):
        mine = range(rank * per_rank, (rank + 1) * per_rank)
        rows: list[Any] = []  # (source rank, token, list of k) or None for a padding row
        tokens, padded = [], []
        if layout == "rank":
            for source in range(size):
                for t, ids in enumerate(topk_ids[source].tolist()):
                    slots = [k for k, e in enumerate(ids) if e in mine]
                    if slots:
                        rows.append((source, t, slots))
        for expert in mine:
            picks = [
                (source, t, [ids.index(expert)])
                for source in range(size)
                for t, ids in enumerate(topk_ids[source].tolist())
                if expert in ids
            ]
            tokens.append(len(picks))
            padded.append(-(-len(picks) // expert_alignment) * expert_alignment)
            if layout == "expert":
                rows += picks + [None] * (padded[-1] - len(picks))
        if capacity is not None:
            rows += [None] * (capacity - len(rows))
        out.append(_gather(rows, mine, xs, scales, topk_ids, topk_weights, layout, top_k, tokens, padded))
    return out


def _gather(
    rows: Any,
    mine: Any,
    xs: Any,
    scales: Any,
    topk_ids: Any,
    topk_weights: Any,
    layout: Any,
    top_k: Any,
    tokens: Any,
    padded: Any,
) -> Received:
    n = len(rows)
    x = torch.zeros((n, xs[0].shape[1]), dtype=xs[0].dtype, device="cpu")
    s = None if scales is None else torch.zeros((n, scales[0].shape[1]), dtype=scales[0].dtype, device="cpu")
    weights = torch.zeros(n if layout == "expert" else (n, top_k), dtype=torch.float32, device="cpu")
    ids: Any = None if layout == "expert" else torch.full((n, top_k), -1, dtype=torch.int64, device="cpu")
    source_rank, source_token = (torch.full((n,), -1, dtype=torch.int64, device="cpu") for _ in range(2))
    for i, row in enumerate(rows):
        if row is None:
            continue
        source, t, slots = row
        x[i] = xs[source][t]
        if s is not None:
            s[i] = scales[source][t]
        source_rank[i], source_token[i] = source, t
        for k in slots:
            if layout == "expert":
                weights[i] = topk_weights[source][t, k]
            else:
                weights[i, k] = topk_weights[source][t, k]
                ids[i, k] = int(topk_ids[source][t, k]) - mine.start
    return Received(
        x,
        s,
        weights,
        ids,
        torch.tensor(tokens, dtype=torch.int64, device="cpu"),
        torch.tensor(padded, dtype=torch.int64, device="cpu"),
        source_rank,
        source_token,
    )


def combine(
    rows: Sequence[torch.Tensor],
    received: Sequence[Received],
    num_tokens: Sequence[int],
    *,
    ranks_per_node: int,
    topk_weights: Sequence[torch.Tensor] | None = None,
    bias: Sequence[torch.Tensor] | None = None,
    wire: Any = None,
) -> list[torch.Tensor]:
    """Compute what every rank gets from Buffer.combine.

    Parameters
    ----------
    rows : list of Tensor [N, hidden] by rank
        Output of the experts.
    received : list of Received by rank
        Result of the dispatch.
    num_tokens : list of int by rank
        Number of tokens.
    ranks_per_node : int
        Each node sums its rows first. The sums of other nodes are rounded to the dtype of the rows.
    topk_weights : list of Tensor [N] by rank, optional
        Only for the expert layout.
    bias : list of Tensor [hidden] or [T, hidden] by rank, optional
    wire : callable or list of callables by source rank, optional
        Applied to the FP32 sum of another node in place of the rounding, see reference_quant.wire.

    Returns
    -------
    list of Tensor [T, hidden] by rank
        Summed in FP32 (FP64 for float64), by ascending node, then rank, then expert.
    """
    size = len(rows)
    dtype, hidden = rows[0].dtype, rows[0].shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = []
    for source in range(size):
        y = torch.zeros((num_tokens[source], hidden), dtype=dtype, device="cpu")
        for t in range(num_tokens[source]):
            total = None
            for node in range(size // ranks_per_node):
                part = None
                for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
                    here = (received[rank].source_rank == source) & (received[rank].source_token == t)
                    for i in torch.nonzero(here).flatten().tolist():
                        term = rows[rank][i].to(wide) * (
                            1.0 if topk_weights is None else topk_weights[rank][i].to(wide)
                        )
                        part = term if part is None else part + term
                if part is None:
                    continue
                if node != source // ranks_per_node:
                    code = wire[source] if isinstance(wire, list) else wire
                    part = code(part) if code else part.to(dtype).to(wide)
                total = part if total is None else total + part
            total = torch.zeros(hidden, dtype=wide, device="cpu") if total is None else total
            if bias is not None:
                b = bias[source]
                total = total + (b[t] if b.dim() == 2 else b).to(torch.float32).to(wide)
            y[t] = total.to(dtype)
        out.append(y)
    return out


@dataclass
class DecodeReceived:
    """Result of a decode dispatch on one rank.

    Attributes
    ----------
    x : Tensor [experts per rank, size * max_tokens, hidden]
        Zero after the rows of each expert.
    scales : Tensor [experts per rank, size * max_tokens, hidden/128] or None
    counts : Tensor int64 [experts per rank]
        Number of rows.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor


def _decode_places(
    topk_ids: Sequence[torch.Tensor], num_experts: int
) -> tuple[dict[tuple[int, int, int], tuple[int, int, int]], list[int]]:
    """({(source, token, k): (rank, local expert, position)} of every pick, number of rows of every expert)."""
    per_rank = num_experts // len(topk_ids)
    filled, places = [0] * num_experts, {}
    for source, ids in enumerate(topk_ids):
        for t, picks in enumerate(ids.tolist()):
            for k, expert in enumerate(picks):
                if expert >= 0:
                    places[source, t, k] = (*divmod(expert, per_rank), filled[expert])
                    filled[expert] += 1
    return places, filled


def decode_dispatch(
    xs: Sequence[torch.Tensor],
    topk_ids: Sequence[torch.Tensor],
    *,
    num_experts: int,
    max_tokens: int,
    scales: Sequence[torch.Tensor] | None = None,
) -> list[DecodeReceived]:
    """Compute what every rank receives from Buffer.decode_dispatch.

    Parameters
    ----------
    xs, topk_ids : list of Tensor [T, hidden], [T, top_k], by rank
    scales : list of Tensor [T, hidden/128] by rank, optional
    num_experts, max_tokens : int
        As for Buffer.

    Returns
    -------
    list of DecodeReceived by rank
    """
    size = len(xs)
    places, filled = _decode_places(topk_ids, num_experts)
    shape = (num_experts // size, size * max_tokens)
    out = [
        DecodeReceived(
            torch.zeros(*shape, xs[0].shape[1], dtype=torch.float32, device="cpu").to(xs[0].dtype),
            None
            if scales is None
            else torch.zeros(*shape, scales[0].shape[1], dtype=scales[0].dtype, device="cpu"),
            torch.tensor(filled[rank * shape[0] : (rank + 1) * shape[0]], dtype=torch.int64, device="cpu"),
        )
        for rank in range(size)
    ]
    for (source, t, _), (rank, expert, at) in places.items():
        out[rank].x[expert, at] = xs[source][t]
        if scales is not None:
            out[rank].scales[expert, at] = scales[source][t]  # type: ignore[index]
    return out


def decode_combine(
    rows: Sequence[torch.Tensor],
    topk_ids: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    *,
    num_experts: int,
    weights_travel: bool = False,
    ranks_per_node: int | None = None,
    wire: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Compute what every rank gets from Buffer.decode_combine.

    Parameters
    ----------
    rows : list of Tensor [experts per rank, size * max_tokens, hidden] by rank
        Output of the experts, in the layout of DecodeReceived.x.
    topk_ids, topk_weights : list of Tensor [T, top_k] by source rank
    weights_travel : bool
        Each owner rank sums its weighted rows of a token and rounds the sum. The source adds these sums in the order
        of each rank's first pick.
    ranks_per_node : int, optional
        Default: one node.
    wire : callable, optional
        Applied to data that crosses between nodes: to a row, or to the FP32 sum of a rank in place of its rounding.

    Returns
    -------
    list of Tensor [T, hidden] by rank
        Summed by ascending k in FP32 (FP64 for float64) and rounded once.
    """
    places, _ = _decode_places(topk_ids, num_experts)
    dtype, hidden = rows[0].dtype, rows[0].shape[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_node = ranks_per_node or len(rows)

    def coded(value: Any, rank: int, source: Any) -> torch.Tensor:
        return wire(value) if wire and rank // per_node != source // per_node else value.to(dtype).to(wide)

    out = []
    for source, ids in enumerate(topk_ids):
        y = torch.zeros((len(ids), hidden), dtype=dtype, device="cpu")
        for t in range(len(ids)):
            terms: dict[int, torch.Tensor] = {}  # by rank, in the order of each rank's first pick
            total = None
            for k in range(ids.shape[1]):
                if (source, t, k) not in places:
                    continue
                rank, expert, at = places[source, t, k]
                row, weight = rows[rank][expert, at].to(wide), topk_weights[source][t, k].to(wide)
                if weights_travel:
                    terms[rank] = row * weight if rank not in terms else terms[rank] + row * weight
                else:
                    term = (coded(row, rank, source) if wire else row) * weight
                    total = term if total is None else total + term
            for rank, term in terms.items():
                part = coded(term, rank, source)
                total = part if total is None else total + part
            if total is not None:
                y[t] = total.to(dtype)
        out.append(y)
    return out
