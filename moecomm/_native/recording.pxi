# A Buffer's recording; part of core. moecomm/record.py writes it and says what is in it.
cdef bytes _bytes_of(const void* data, size_t size):
    return (<const char*>data)[:size] if size else b""


cdef class Recording:
    """Calls of a Buffer and its Decode, in memory."""
    cdef shared_ptr[capi.Recording] r

    def __cinit__(self, int top_k, int num_experts):
        self.r = make_shared[capi.Recording](top_k, num_experts)

    @property
    def nbytes(self):
        """What take() would give, about."""
        return self.r.get().bytes()
