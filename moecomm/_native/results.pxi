# Dispatched and Handle, of moecomm/results.py, filled without running Python; part of core.

cdef object _dispatched_type = None, _handle_type = None


def return_as(dispatched_type, handle_type):
    """Name the classes of which try_dispatch makes objects."""
    global _dispatched_type, _handle_type
    _dispatched_type, _handle_type = dispatched_type, handle_type


cdef object _dispatched(owner, layout, Plan plan, Block block, Block output, const capi.Shape& shape, int64_t rows, bint weighted):
    handle, dispatched = object.__new__(_handle_type), object.__new__(_dispatched_type)
    handle._buffer, handle.layout = owner, layout
    handle.num_rows, handle.num_tokens = rows, plan.p.get().view.tokens
    handle._made_plan, handle._made_output = plan, output
    dispatched.handle, dispatched._block = handle, block
    # What is wanted of nearly every dispatch is made here: rows, and the weights that go into combine.
    cdef capi.CallShape* call = &plan.p.get().view.call
    cdef capi.BlockLayout at = capi.block_layout(rows, call[0], shape.top_k)
    cdef char* data = block.b.get().data()
    cdef bint by_rank = call.layout == capi.RowLayout.rank
    x = _rows_at(block, data + at.rows, &shape, rows) if rows else None
    weights = _tensor_at(block, data + at.weights, _FLOAT, 32, rows, 0) if rows and weighted and not by_rank else None
    if x is not None:
        dispatched.x = x
    if weights is not None:
        dispatched.topk_weights = weights
    return dispatched


def tensor_at(Block block, uint64_t offset, int code, int bits, int64_t rows, int64_t columns):
    """A tensor [rows, columns], or [rows] where columns is 0, in a block. None where torch makes none by DLPack."""
    if _exchange == NULL:
        return None
    return _tensor_at(block, block.b.get().data() + offset, code, bits, rows, columns)


def counts_of(Plan plan, int n):
    """True and padded rows of n local experts, int64 [n] each. None as above."""
    if _exchange == NULL:
        return None
    return _copied(plan.p.get().view.tokens_per_expert, n), _copied(plan.p.get().view.rows_per_expert, n)
