"""Dtypes of the arrays in the segments of a recording. moecomm.record describes their meaning."""

from __future__ import annotations

from typing import Any

import numpy as np

FORMAT = 2
HOPS = (
    "rail_logical_rows",
    "rail_physical_rows",
    "rail_logical_bytes",
    "rail_physical_bytes",
    "node_logical_rows",
    "node_physical_rows",
    "node_logical_bytes",
    "node_physical_bytes",
    "replicated_rows",
)
DECODE_OPS = ("decode_dispatch", "decode_receive", "decode_combine", "decode_sum")
CALL = np.dtype(
    [
        ("op", "U15"),  # dispatch | combine | one of DECODE_OPS
        ("plan", "i8"),  # index of the plan, counted over the dispatches whose picks are recorded
        ("cached", "?"),  # a combine, or a dispatch that reuses its plan
        ("tokens", "i4"),
        ("weighted", "?"),  # a dispatch that sends weights, or a combine that applies them
        ("layout", "U6"),
        ("alignment", "i4"),
        ("capacity", "i8"),  # -1: none
        ("coding", "U9"),  # quant= of a dispatch, wire= of a combine; "": none
        ("begin_ns", "i8"),  # time.perf_counter_ns of this process
        ("end_ns", "i8"),
        ("phases", "i4"),  # number of records in `phases` that belong to this call
        *((name, "u8") for name in HOPS),
    ]
)
OPS = ("dispatch", "combine", *DECODE_OPS)  # in the order of RecordedOp in C++
# RecordedCall and RoleSpan of C++.
NATIVE_CALL = np.dtype(
    [
        *((name, "i8") for name in ("plan", "capacity", "begin", "end", "spans")),
        *((name, "u8") for name in HOPS),
        *(
            (name, "i4")
            for name in ("op", "tokens", "alignment", "coding", "cached", "weighted", "by_rank", "unused")
        ),
    ]
)
NATIVE_SPAN = np.dtype([("role", "i4"), ("unused", "i4"), ("begin", "i8"), ("end", "i8")])
PHASE = np.dtype([("role", "U8"), ("begin", "f8"), ("end", "f8")])  # seconds of time.perf_counter


def ids_dtype(num_experts: int) -> Any:
    """Dtype of recorded picks."""
    return np.int16 if num_experts <= 32768 else np.int32
