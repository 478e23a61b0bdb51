# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The plan of a dispatch, in the memory of this process."""
cimport cython
from libc.stdint cimport int64_t

from moecomm._native cimport capi
from moecomm._native.shared.tensors cimport can_make, copy_numbers


@cython.freelist(8)
cdef class Plan:
    """The plan of one routing. It does not keep the window alive."""

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
    def alignment(self):
        return self.p.get().view.call.alignment

    def picks(self, int64_t[:, ::1] ids):
        """Write the topk_ids [T, K] of the plan to ids; -1: no pick."""
        cdef capi.PlanView* view = &self.p.get().view
        cdef int64_t t, i, top_k = ids.shape[1]
        ids[:, :] = -1
        for t in range(ids.shape[0]):
            for i in range(view.picks[t]):
                ids[t, view.pick[t * top_k + i].k] = view.pick[t * top_k + i].expert

    @property
    def by_rank(self):
        return self.p.get().view.call.layout == capi.RowLayout.rank

    def counts(self, int n):
        """Return the rows of n local experts without and with padding, int64 [n]; None if torch cannot make them."""
        if not can_make():
            return None
        cdef capi.PlanView* view = &self.p.get().view
        return copy_numbers(view.tokens_per_expert, n), copy_numbers(view.rows_per_expert, n)
