# Dispatched and Handle, of moecomm/results.py, filled without running Python; part of core.

cdef object _dispatched_type = None, _handle_type = None


def return_as(dispatched_type, handle_type):
    """Name the classes of which try_dispatch makes objects."""
    global _dispatched_type, _handle_type
    _dispatched_type, _handle_type = dispatched_type, handle_type


cdef object _dispatched(owner, layout, Plan plan, Block block, Block output, const capi.Shape& shape, int64_t rows):
    handle, dispatched = object.__new__(_handle_type), object.__new__(_dispatched_type)
    handle._buffer, handle.layout, handle._capacity = owner, layout, None
    handle.num_rows, handle.num_tokens = rows, plan.p.get().view.tokens
    handle._made_plan, handle._made_output = plan, output
    handle._made_tensor = handle._made_rows = handle._made_counts = None
    dispatched.handle, dispatched.lost_weight, dispatched._block, dispatched._fields = handle, None, block, None
    # Rows lie first in their block.
    dispatched._x = None if rows == 0 else _tensor_at(block, block.b.get().data(), &shape, rows)
    return dispatched
