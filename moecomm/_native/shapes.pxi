# Plain structures of C++ from Python's numbers, and back; part of core.

# By the numbers of capi.FaultPoint and capi.FaultAction.
_POINTS = ("none", "put", "copy", "reduce", "wait")
_ACTIONS = ("damage", "omit", "stop", "kill")


cdef capi.Shape _shape(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts=0):
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


cdef capi.Geometry _geometry(rank, size, ranks_per_node):
    cdef capi.Geometry g
    g.rank = rank
    g.size = size
    g.ranks_per_node = ranks_per_node
    return g


cdef capi.Fault _fault(str point, str action, int64_t passes, str phase):
    cdef capi.Fault fault
    fault.point = <capi.FaultPoint><int>_POINTS.index(point)
    fault.action = <capi.FaultAction><int>_ACTIONS.index(action)
    fault.phase = <capi.Phase><int>PHASES.index(phase)
    fault.passes = passes
    return fault


cdef tuple _hops(const capi.Counters& c):
    return (c.rail.logical_rows, c.rail.physical_rows, c.rail.logical_bytes, c.rail.physical_bytes,
            c.node.logical_rows, c.node.physical_rows, c.node.logical_bytes, c.node.physical_bytes, c.replicated_rows)
