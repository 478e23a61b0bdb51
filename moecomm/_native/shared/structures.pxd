# Converts Python numbers to C++ structures and back. The functions are inline: every module has a copy, without state.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t

from moecomm._native cimport capi


cdef inline capi.Shape shape_of(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes,
                                logical_experts) except *:
    cdef capi.Shape s
    s.hidden = hidden
    s.dtype = <capi.DType><int>dtype
    s.num_experts = num_experts
    s.top_k = top_k
    s.max_tokens = max_tokens
    s.channels = channels
    s.arena_bytes = arena_bytes
    s.logical_experts = logical_experts
    return s


cdef inline capi.Geometry geometry_of(rank, size, ranks_per_node) except *:
    cdef capi.Geometry g
    g.rank, g.size, g.ranks_per_node = rank, size, ranks_per_node
    return g


cdef inline capi.Geometry geometry_from(geometry) except *:
    """Of (rank, size, ranks per node)."""
    rank, size, ranks_per_node = geometry
    return geometry_of(rank, size, ranks_per_node)


cdef inline void fill_dispatch(capi.DispatchCall* call, uintptr_t x, uintptr_t scales, uintptr_t ids,
                               bint ids_are_int32, uintptr_t weights, int tokens, bint by_rank, int alignment,
                               int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes, int scale_kind,
                               bint scales_by_column, uint32_t routing) noexcept:
    call.x = <const char*>x
    call.scales = <const char*>scales
    if ids_are_int32:
        call.ids32 = <const int32_t*>ids
    else:
        call.ids64 = <const int64_t*>ids
    call.weights = <const float*>weights
    call.tokens = tokens
    call.shape.layout = capi.RowLayout.rank if by_rank else capi.RowLayout.expert
    call.shape.alignment = alignment
    call.shape.capacity = capacity
    call.shape.row_bytes = row_bytes
    call.shape.scale_bytes = scale_bytes
    call.shape.scales = <capi.ScaleKind>scale_kind
    call.shape.scales_by_column = scales_by_column
    call.shape.routing = routing


cdef inline void fill_combine(capi.CombineCall* call, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias,
                              int64_t bias_stride, uintptr_t back, uintptr_t slots, int wire,
                              bint sums_back) noexcept:
    call.rows = <const char*>rows
    call.weights = <const float*>weights
    call.back = <const float*>back
    call.y = <char*>y
    call.returned = <float*>slots
    call.sums_back = sums_back
    call.bias = <const float*>bias
    call.bias_stride = bias_stride
    call.wire = <capi.Wire>wire


cdef inline void fill_decode_dispatch(capi.DecodeDispatchCall* call, uintptr_t x, uintptr_t scales, uintptr_t ids,
                                      bint ids_are_int32, uintptr_t weights, bint weighted, int tokens, int quant,
                                      bint by_column, bint receive) noexcept:
    call.x = <const char*>x
    call.scales = <const char*>scales
    if ids_are_int32:
        call.ids32 = <const int32_t*>ids
    else:
        call.ids64 = <const int64_t*>ids
    call.weights = <const float*>weights
    call.weighted = weighted
    call.tokens = tokens
    call.quant = <capi.ScaleKind>quant
    call.scales_by_column = by_column
    call.receive = receive


cdef inline void fill_decode_combine(capi.DecodeCombineCall* call, uint64_t epoch, uintptr_t rows, uintptr_t ids,
                                     bint ids_are_int32, uintptr_t weights, int wire, uintptr_t y,
                                     bint receive) noexcept:
    call.epoch = epoch
    call.rows = <const char*>rows
    if ids_are_int32:
        call.ids32 = <const int32_t*>ids
    else:
        call.ids64 = <const int64_t*>ids
    call.weights = <const float*>weights
    call.wire = <capi.Wire>wire
    call.y = <char*>y
    call.receive = receive


cdef inline tuple offsets_of(capi.CallShape call, uint64_t rows, uint64_t row_bytes, uint64_t scale_bytes,
                             bint scales_by_column, int top_k):
    """Return the offsets of rows, scales, weights, ids and source in the block of a dispatch of such rows."""
    call.row_bytes = row_bytes   # the plan may have been reused for rows of another size
    call.scale_bytes = scale_bytes
    call.scales_by_column = scales_by_column
    cdef capi.BlockLayout l = capi.block_layout(rows, call, top_k)
    return l.rows, l.scales, l.weights, l.ids, l.source
