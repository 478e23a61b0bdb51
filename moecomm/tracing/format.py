"""What the arrays of a recording's segments look like; moecomm.record says what they mean."""

from __future__ import annotations

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
        (
            "plan",
            "i8",
        ),  # number of the dispatch that it belongs to, counted over those whose picks are recorded
        ("cached", "?"),  # a dispatch that reuses its plan
        ("tokens", "i4"),
        ("weighted", "?"),  # weights travel (dispatch), are applied (combine)
        ("layout", "U6"),
        ("alignment", "i4"),
        ("capacity", "i8"),  # -1: none
        ("coding", "U9"),  # of a dispatch's rows (quant=), of a combine's between nodes (wire=); "": none
        ("begin_ns", "i8"),  # time.perf_counter_ns of this process
        ("end_ns", "i8"),
        ("phases", "i4"),  # how many records of `phases` are this call's
        *((name, "u8") for name in HOPS),
    ]
)
OPS = ("dispatch", "combine", *DECODE_OPS)  # by the numbers of the C++ RecordedOp
# C++ RecordedCall and RoleSpan.
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


def ids_dtype(num_experts):
    """Of recorded picks."""
    return np.int16 if num_experts <= 32768 else np.int32
