# The cuda world's decode path. moecomm/decode.py validates and documents; moecomm/cuda_decode.py knows the streams.


cdef class DecodeArea:
    """Memory of a Decode that tensors are views of; keeps it allocated. Not the Python object, as in the cpu world."""
    cdef shared_ptr[cudaapi.DeviceDecode] owner
    cdef char* data
    cdef int64_t size

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.size,), "typestr": "|u1", "data": (<uintptr_t>self.data, False), "version": 3}


cdef class Decode:
    cdef shared_ptr[cudaapi.DeviceDecode] d
    cdef capi.Shape shape

    def __cinit__(self, geometry, Reach reach, int device, hidden, dtype, num_experts, top_k, max_tokens, bint check, spread, int stages,
                  double timeout):
        cdef capi.Geometry g
        cdef cudaapi.Spread s
        g.rank, g.size, g.ranks_per_node = geometry
        s.sms, s.warps, s.senders, s.stage_bytes = spread
        s.stages = stages
        self.shape.hidden = hidden
        self.shape.dtype = <capi.DType><int>dtype
        self.shape.num_experts = num_experts
        self.shape.top_k = top_k
        self.shape.max_tokens = max_tokens
        self.shape.channels = 1
        with nogil:
            self.d = make_shared[cudaapi.DeviceDecode](g, self.shape, check, device, reach.r, s, timeout)

    def card(self):
        return <bytes>self.d.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        with nogil:
            self.d.get().connect(c)

    def area(self, str name, int bank):
        """x, scales, rows or counts of a bank, as bytes."""
        cdef DecodeArea area = DecodeArea.__new__(DecodeArea)
        cdef cudaapi.DeviceDecode* d = self.d.get()
        cdef int64_t rows = d.view().packed_rows()
        area.owner = self.d
        if name == "x":
            area.data, area.size = d.x(bank), rows * self.shape.combine_row_bytes()
        elif name == "scales":
            area.data, area.size = d.scales(bank), self.scale_area * d.view().experts_per_rank()
        elif name == "rows":
            area.data, area.size = d.rows(bank), rows * self.shape.combine_row_bytes()
        else:
            area.data, area.size = d.counts(bank), 8 * d.view().experts_per_rank()
        return area

    def window(self):
        """As Buffer.window()."""
        return <uintptr_t>self.d.get().window().data(), self.d.get().window().bytes()

    @property
    def scale_area(self):
        """Bytes from one expert's scales to the next one's."""
        return cudaapi.decode_scale_area(self.d.get().view().geometry, self.shape)

    @property
    def epoch(self):
        """Number of the latest dispatch."""
        return self.d.get().epoch()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, bint weighted, int tokens,
                 int quant, bint by_column, bint receive, uintptr_t stream):
        """None or a Failure. Enqueued on `stream`."""
        cdef cudaapi.DeviceDecodeDispatch call
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
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
        call.stream = <void*>stream
        with nogil:
            s = d.dispatch(call)
        return _failure(s)

    def dispatch_receive(self, uint64_t epoch, uintptr_t stream):
        """None or a Failure. Enqueued on `stream`; nothing where it is received already."""
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        with nogil:
            s = d.dispatch_receive(epoch, <void*>stream)
        return _failure(s)

    def combine(self, uint64_t epoch, uintptr_t rows, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int wire, uintptr_t y,
                bint receive, uintptr_t stream):
        """None or a Failure. Enqueued on `stream`."""
        cdef cudaapi.DeviceDecodeCombine call
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
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
        call.stream = <void*>stream
        with nogil:
            s = d.combine(call)
        return _failure(s)

    def combine_receive(self, uint64_t epoch, uintptr_t stream):
        """None or a Failure. Enqueued on `stream`; nothing where it is received already."""
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        with nogil:
            s = d.combine_receive(epoch, <void*>stream)
        return _failure(s)

    def refuse(self, str verb, uint64_t epoch, int why, uintptr_t stream):
        """As the cpu world's Decode.refuse. Waits for `stream`."""
        cdef cudaapi.DeviceDecodeDispatch call
        cdef capi.Status s
        cdef bint dispatches = verb == "decode_dispatch"
        cdef cudaapi.DeviceDecode* d = self.d.get()
        call.refused = <capi.Why>why
        call.receive = True
        call.stream = <void*>stream
        with nogil:
            s = d.dispatch(call) if dispatches else d.refuse_combine(epoch, <capi.Why>why, <void*>stream)
        return _failure(s)

    def fault(self):
        """What kernels have reported so far, or None."""
        return _failure(self.d.get().fault())

    def stage(self, uint64_t epoch, uintptr_t stream):
        """0 its places are used by a later epoch or it belongs to another capture, 1 sent, 2 received, 3 answered, 4 done."""
        return <int>self.d.get().stage(epoch, <void*>stream)

    def counters(self):
        """As Buffer.counters()."""
        return _counters(self, self.d.get().counters())

    def take_counters(self):
        cdef capi.Counters c
        with nogil:
            c = self.d.get().take_counters()
        return c
