# The decode path; part of core, whose Communicator it needs. moecomm/decode.py documents and validates.

cdef class Area:
    """Memory of a Decode that tensors are views of; keeps it mapped."""
    cdef Decode owner
    cdef char* data
    cdef int64_t size

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)


cdef class Decode:
    cdef shared_ptr[capi.Decode] d
    cdef capi.Shape shape

    def __cinit__(self, Communicator comm, Buffer buffer, bint check):
        self.shape = buffer.shape
        with nogil:
            self.d = make_shared[capi.Decode](comm.c, self.shape, check)

    def card(self):
        return <bytes>self.d.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        with nogil:
            self.d.get().connect(c)

    def connected(self):
        self.d.get().connected()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, bint weighted, int tokens,
                 uint64_t row_bytes, uint64_t scale_bytes, bint receive):
        """The epoch, or a Failure."""
        cdef capi.DecodeDispatchCall call
        cdef capi.Status s
        cdef capi.Decode* d = self.d.get()
        call.x = <const char*>x
        call.scales = <const char*>scales
        if ids_are_int32:
            call.ids32 = <const int32_t*>ids
        else:
            call.ids64 = <const int64_t*>ids
        call.weights = <const float*>weights
        call.weighted = weighted
        call.tokens = tokens
        call.row_bytes = row_bytes
        call.scale_bytes = scale_bytes
        call.receive = receive
        with nogil:
            s = d.dispatch(call)
        if s.code != capi.Code.ok:
            return _failure(s)
        return d.epoch()

    def dispatch_receive(self, uint64_t epoch):
        """None or a Failure."""
        cdef capi.Status s
        cdef capi.Decode* d = self.d.get()
        with nogil:
            s = d.dispatch_receive(epoch)
        return None if s.code == capi.Code.ok else _failure(s)

    def combine(self, uint64_t epoch, uintptr_t rows, uintptr_t ids, bint ids_are_int32, uintptr_t weights, uintptr_t y, bint receive):
        """None or a Failure."""
        cdef capi.DecodeCombineCall call
        cdef capi.Status s
        cdef capi.Decode* d = self.d.get()
        call.epoch = epoch
        call.rows = <const char*>rows
        if ids_are_int32:
            call.ids32 = <const int32_t*>ids
        else:
            call.ids64 = <const int64_t*>ids
        call.weights = <const float*>weights
        call.y = <char*>y
        call.receive = receive
        with nogil:
            s = d.combine(call)
        return None if s.code == capi.Code.ok else _failure(s)

    def combine_receive(self, uint64_t epoch):
        """None or a Failure."""
        cdef capi.Status s
        cdef capi.Decode* d = self.d.get()
        with nogil:
            s = d.combine_receive(epoch)
        return None if s.code == capi.Code.ok else _failure(s)

    def stage(self, uint64_t epoch):
        """0 its places are used by a later epoch, 1 sent, 2 received, 3 answered, 4 done."""
        return self.d.get().stage(epoch)

    def area(self, str name, int parity):
        """x, scales, rows or counts of a parity, as bytes."""
        cdef Area area = Area.__new__(Area)
        cdef capi.Decode* d = self.d.get()
        cdef int64_t rows = d.packed_rows()
        area.owner = self
        if name == "x":
            area.data, area.size = d.x(parity), rows * self.shape.combine_row_bytes()
        elif name == "scales":
            area.data, area.size = d.scales(parity), rows * self.shape.scale_bytes()
        elif name == "rows":
            area.data, area.size = d.rows(parity), rows * self.shape.combine_row_bytes()
        else:
            area.data, area.size = <char*>d.counts(parity), 8 * d.num_local_experts()
        return area

    def take_counters(self):
        cdef capi.Counters c
        with nogil:
            c = self.d.get().take_counters()
        return c

    def set_stream_threshold(self, uint64_t bytes):
        self.d.get().set_stream_threshold(bytes)


def decode_bytes(rank, size, ranks_per_node, hidden, dtype, num_experts, top_k, max_tokens):
    return capi.Decode.bytes(_geometry(rank, size, ranks_per_node), _shape(hidden, dtype, num_experts, top_k, max_tokens, 1, 0))
