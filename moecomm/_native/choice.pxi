cdef class Choice:
    """How the batches of one layer choose replicas; mode 0: local, 1: even, 2: optimal; activate 0: all slots may run."""
    cdef unique_ptr[capi.Choice] c

    def __cinit__(self, const int32_t[::1] physical_to_logical, int experts, int ranks, int nodes, int mode, int activate):
        self.c.reset(new capi.Choice(&physical_to_logical[0], <int>physical_to_logical.shape[0], experts, ranks, nodes, <capi.Mode>mode, activate))

    @property
    def needs_all(self):
        """Whether the choice depends on the picks of all ranks."""
        return self.c.get().needs_all()


cdef class Chosen:
    """A choice asked for: where its results go."""
    cdef Choice choice
    cdef uint32_t routing
    cdef int64_t[:, ::1] slots
    cdef int32_t[::1] counted

    def __cinit__(self, Choice choice not None, uint32_t routing, int64_t[:, ::1] slots, int32_t[::1] counted):
        """slots [T, K] and counted [experts] are written; routing: equal on all ranks, or the call is a mismatch."""
        self.choice, self.routing, self.slots, self.counted = choice, routing, slots, counted

    cdef void ask(self, capi.DispatchCall* call):
        call.choice = self.choice.c.get()
        call.slots = &self.slots[0, 0] if self.slots.shape[0] else NULL
        call.counted = &self.counted[0]
        call.shape.routing = self.routing
