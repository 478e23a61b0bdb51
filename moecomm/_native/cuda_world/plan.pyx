# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The plan of a dispatch, in the memory of a GPU."""
from moecomm._native cimport capi
from moecomm._native.cuda_world.counts cimport counts_of_plan


cdef class Plan:
    """The plan of one routing, in device memory."""

    @property
    def tokens(self):
        return self.p.get().view.tokens

    def rows(self, int local_rank):
        return self.p.get().num_rows

    def tokens_per_expert(self, int n):
        return counts_of_plan(self.p, self.p.get().view.tokens_per_expert, n)

    def rows_per_expert(self, int n):
        return counts_of_plan(self.p, self.p.get().view.rows_per_expert, n)

    @property
    def by_rank(self):
        return self.p.get().view.call.layout == capi.RowLayout.rank
