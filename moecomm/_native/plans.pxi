# What a dispatch leaves behind: pieces of the window, and the plan; part of core.

@cython.freelist(8)
cdef class Block:
    """A piece of the window that tensors are views of; freed with the last of them."""
    cdef shared_ptr[capi.Block] b

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.b.get().data(), self.b.get().bytes(), 0, flags)

    @property
    def nbytes(self):
        return self.b.get().bytes()

    @property
    def address(self):
        return <uintptr_t>self.b.get().data()


@cython.freelist(8)
cdef class Plan:
    """Where every row of one routing goes. Keeps nothing of the window."""
    cdef shared_ptr[capi.Plan] p

    @property
    def tokens(self):
        return self.p.get().view.tokens

    def rows(self, int local_rank):
        cdef capi.CallShape* call = &self.p.get().view.call
        return call.capacity if call.capacity >= 0 else self.p.get().view.rank_rows[local_rank]

    def real_rows(self, int local_rank):
        return self.p.get().view.rank_rows[local_rank]

    def tokens_per_expert(self, int n):
        return [self.p.get().view.tokens_per_expert[i] for i in range(n)]

    def rows_per_expert(self, int n):
        return [self.p.get().view.rows_per_expert[i] for i in range(n)]

    @property
    def by_rank(self):
        return self.p.get().view.call.layout == capi.RowLayout.rank
