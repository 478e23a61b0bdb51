# The decode path; part of core, whose Communicator it needs. moecomm/decode.py validates and documents; at a few
# tokens per call that costs more than the call, so a call whose tensors are as they should be is recognised here.
include "refusals.pxi"


cdef class DecodeReceived:
    """What decode_dispatch returns; to be read after its hook.

    .x [experts per rank, size * decode_max_tokens, hidden]: the rows of local expert e are x[e, :counts[e]], in order
    (source rank, source token); what lies behind them is undefined. .scales [.., hidden/128] f32 (int32 [.., hidden/512]
    for UE8M0) of quantized rows, else None. .counts int64 [experts per rank]. .handle for decode_combine. The tensors
    are memory of the buffer: the dispatch after the next one overwrites them.
    """
    cdef readonly object x, scales, counts, handle


cdef class DecodeHandle:
    """What decode_combine needs; good for one combine, until the dispatch after the next one.

    .rows [experts per rank, size * decode_max_tokens, hidden] of the buffer's dtype: a place for the experts' output.
    Written there (after the dispatch's hook) and passed to decode_combine, it is sent without a staging copy.
    """
    cdef readonly object rows
    cdef readonly int tokens
    cdef readonly bint weights_travel
    cdef readonly uint64_t epoch
    cdef readonly Decode decode
    cdef object keep   # what the combine's second phase reads or writes

    def receive_dispatch(self):
        """The hook of decode_dispatch."""
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.decode.borrow("decode_dispatch")
        with nogil:
            s = held.get().dispatch_receive(self.epoch)
            held.reset()
        _left(self.decode.comm)
        if s.code != capi.Code.ok:
            self.decode.fail(_failure(s), "decode_dispatch")

    def receive_combine(self):
        """The hook of decode_combine."""
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.decode.borrow("decode_combine")
        with nogil:
            s = held.get().combine_receive(self.epoch)
            held.reset()
        _left(self.decode.comm)
        self.keep = None
        if s.code != capi.Code.ok:
            self.decode.fail(_failure(s), "decode_combine")


cdef class Area:
    """Memory of a Decode that tensors are views of; keeps it mapped. Not the Python object, which holds these tensors: a cycle through a
    tensor's memory is none that the garbage collector sees."""
    cdef shared_ptr[capi.Decode] owner
    cdef char* data
    cdef int64_t size

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)


cdef class Decode:
    cdef shared_ptr[capi.Decode] d
    cdef Communicator comm
    cdef capi.Shape shape
    cdef readonly object fail          # (Failure, op): raises
    cdef list x, scales, counts, rows  # tensors: x and scales by (2 * kind + parity), counts and rows by parity
    cdef Windows windows
    cdef list current                  # handles by parity: a phase that a later dispatch catches up on finds its memory

    def __cinit__(self, Communicator comm, Buffer buffer, bint check, fail, int max_tokens):
        self.shape = buffer.shape
        self.shape.max_tokens = max_tokens
        self.fail = fail
        self.current = [None, None]
        self.comm = comm
        _enter(comm.c.get(), "decode")
        with nogil:
            self.d = capi.make_decode(comm.c, self.shape, check)
        buffer.windows.decode = _extent(self.d.get().window())
        self.windows = buffer.windows

    def __dealloc__(self):
        with nogil:
            self.d.reset()

    cdef shared_ptr[capi.Decode] borrow(self, str op) except *:
        """As Buffer.borrow()."""
        _enter(&self.d.get().comm(), op)
        return self.d

    def card(self):
        return <bytes>self.d.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        cdef shared_ptr[capi.Decode] held = self.borrow("decode")
        with nogil:
            held.get().connect(c)
            held.reset()
        _left(self.comm)

    def connected(self):
        self.d.get().connected()

    def area(self, str name, int parity):
        """x, scales, rows or counts of a parity, as bytes."""
        cdef Area area = Area.__new__(Area)
        cdef capi.Decode* d = self.d.get()
        cdef int64_t rows = d.packed_rows()
        area.owner = self.d
        if name == "x":
            area.data, area.size = d.x(parity), rows * self.shape.combine_row_bytes()
        elif name == "scales":
            area.data, area.size = d.scales(parity), d.scale_area() * d.num_local_experts()
        elif name == "rows":
            area.data, area.size = d.rows(parity), rows * self.shape.combine_row_bytes()
        else:
            area.data, area.size = <char*>d.counts(parity), 8 * d.num_local_experts()
        return area

    def window(self):
        """As Buffer.window()."""
        return <uintptr_t>self.windows.decode.data, self.windows.decode.size

    @property
    def scale_area(self):
        """Bytes from one expert's scales to the next one's."""
        return self.d.get().scale_area()

    def hold(self, list x, list scales, list counts, list rows):
        """The tensors that dispatches hand out."""
        self.x, self.scales, self.counts, self.rows = x, scales, counts, rows

    def try_dispatch(self, x, topk_ids, topk_weights, int quant, bint receive):
        """(DecodeReceived, hook or None); None where a tensor needs a closer look."""
        cdef DLTensor rows, ids, weights
        cdef capi.DecodeDispatchCall call
        if _forward_ad._current_level >= 0 or not _read_rows(x, &rows, &self.shape) or rows.shape[0] > self.shape.max_tokens:
            return None
        if not _read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != rows.shape[0]:
            return None
        if topk_weights is not None:
            if not _read(topk_weights, &weights, self.shape.top_k, _FLOAT, 32) or weights.shape[0] != rows.shape[0]:
                return None
            call.weights = <const float*>weights.data
            call.weighted = True
        call.x = <const char*>rows.data
        call.tokens = rows.shape[0]
        call.quant = <capi.ScaleKind>quant
        call.receive = receive
        return self.run_dispatch(call)

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, bint weighted, int tokens,
                 int quant, bint by_column, bint receive):
        """(DecodeReceived, hook or None)"""
        cdef capi.DecodeDispatchCall call
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
        return self.run_dispatch(call)

    cdef object run_dispatch(self, const capi.DecodeDispatchCall& call):
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_dispatch")
        cdef uint64_t epoch = 0
        cdef int parity, kind = <int>call.quant
        with nogil:
            s = held.get().dispatch(call, epoch)
            held.reset()
        _left(self.comm)
        if s.code != capi.Code.ok:
            self.fail(_failure(s), "decode_dispatch")
        cdef DecodeHandle handle = DecodeHandle.__new__(DecodeHandle)
        cdef DecodeReceived received = DecodeReceived.__new__(DecodeReceived)
        handle.decode = self
        handle.epoch = epoch
        handle.tokens = call.tokens
        handle.weights_travel = call.weighted
        parity = handle.epoch & 1
        handle.rows = self.rows[parity]
        received.x = self.x[2 * (kind > 0) + parity]
        received.scales = self.scales[2 * (kind + 2 * call.scales_by_column) + parity]
        received.counts = self.counts[parity]
        received.handle = handle
        return received, (None if call.receive else handle.receive_dispatch)

    def try_combine(self, rows, topk_ids, topk_weights, handle, out, bint receive):
        """(y, hook or None); None where something needs a closer look."""
        cdef DLTensor ids, weights, y
        cdef capi.DecodeCombineCall call
        cdef DecodeHandle h
        if type(handle) is not DecodeHandle or _forward_ad._current_level >= 0:
            return None
        h = <DecodeHandle>handle
        if h.decode is not self or rows is not h.rows or self.d.get().stage(h.epoch) != 2:
            return None
        if not _read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != h.tokens:
            return None
        if topk_weights is not None:
            if h.weights_travel or not _read(topk_weights, &weights, self.shape.top_k, _FLOAT, 32) or weights.shape[0] != h.tokens:
                return None
            call.weights = <const float*>weights.data
        if not _read_rows(out, &y, &self.shape) or y.shape[0] != h.tokens:
            return None
        call.rows = self.d.get().rows(h.epoch & 1)
        call.y = <char*>y.data
        if not _outside(self.windows, y.data, y.shape[0] * self.shape.combine_row_bytes()):
            return None
        if not _apart(y.data, y.shape[0] * self.shape.combine_row_bytes(), ids.data, ids.shape[0] * ids.shape[1] * (ids.dtype.bits // 8)):
            return None
        if call.weights != NULL and not _apart(y.data, y.shape[0] * self.shape.combine_row_bytes(), call.weights, 4 * weights.shape[0] * weights.shape[1]):
            return None
        call.receive = receive
        return self.run_combine(call, h, rows, out)

    def combine(self, DecodeHandle handle, rows, uintptr_t rows_at, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int wire,
                out, uintptr_t y, bint receive):
        """(out, hook or None)"""
        cdef capi.DecodeCombineCall call
        call.rows = <const char*>rows_at
        if ids_are_int32:
            call.ids32 = <const int32_t*>ids
        else:
            call.ids64 = <const int64_t*>ids
        call.weights = <const float*>weights
        call.wire = <capi.Wire>wire
        call.y = <char*>y
        call.receive = receive
        return self.run_combine(call, handle, rows, out)

    cdef object run_combine(self, capi.DecodeCombineCall& call, DecodeHandle handle, rows, out):
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_combine")
        call.epoch = handle.epoch
        with nogil:
            s = held.get().combine(call)
            held.reset()
        _left(self.comm)
        if s.code != capi.Code.ok:
            self.fail(_failure(s), "decode_combine")
        if call.receive:
            return out, None
        handle.keep = (rows, out)
        self.current[handle.epoch & 1] = handle
        return out, handle.receive_combine

    @property
    def epoch(self):
        """Number of the latest dispatch."""
        return self.d.get().epoch() if self.d else 0

    def refuse(self, str verb, uint64_t epoch, int why):
        """As core.refuse: in the place of a "decode_dispatch", or of the "decode_combine" of an epoch (nothing where that is not open for one)."""
        cdef capi.DecodeDispatchCall call
        cdef capi.Status s
        cdef bint dispatches = verb == "decode_dispatch"
        cdef shared_ptr[capi.Decode] held = self.borrow(verb)
        call.refused = <capi.Why>why
        with nogil:
            s = held.get().dispatch(call, epoch) if dispatches else held.get().refuse_combine(epoch, <capi.Why>why)
            held.reset()
        _left(self.comm)
        return None if s.code == capi.Code.ok or capi.keeps_step(s) else _failure(s)

    def trace(self, bint on):
        """Start a timeline of roles, or end it."""
        cdef shared_ptr[capi.Decode] held = self.borrow("trace")
        with nogil:
            held.get().trace(on)
            held.reset()
        _left(self.comm)

    def take_timeline(self):
        """As Buffer.take_timeline()."""
        cdef vector[capi.RoleSpan] spans
        cdef shared_ptr[capi.Decode] held = self.borrow("trace")
        with nogil:
            spans = held.get().take_timeline()
            held.reset()
        _left(self.comm)
        return _named(spans)

    def record(self, Recording recording not None):
        """Recorded there from here on."""
        cdef shared_ptr[capi.Recording] r = recording.r
        cdef shared_ptr[capi.Decode] held = self.borrow("record")
        with nogil:
            held.get().record(r)
            held.reset()
        _left(self.comm)

    def stage(self, uint64_t epoch):
        """0 its places are used by a later epoch, 1 sent, 2 received, 3 answered, 4 done."""
        return self.d.get().stage(epoch)

    def counters(self):
        """As Buffer.counters()."""
        cdef capi.Counters c
        cdef shared_ptr[capi.Decode] held = self.borrow("stats")
        with nogil:
            c = held.get().counters()
            held.reset()
        _left(self.comm)
        return _hops(c)

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[capi.Decode] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
            held.reset()
        _left(self.comm)
        return c

    def set_stream_threshold(self, uint64_t bytes):
        self.d.get().set_stream_threshold(bytes)

    def set_fault(self, str point, str action, int64_t passes=0, str phase="none"):
        """Tests only: as Buffer.set_fault, in the decode path."""
        self.d.get().set_fault(_fault(point, action, passes, phase))


cdef class DecodeFloor:
    """A decode step's bytes and flags without anything else, for benchmarks."""
    cdef Decode decode
    cdef shared_ptr[capi.DecodeFloor] f
    cdef object keep

    def __cinit__(self, Decode decode, x, y):
        self.decode, self.keep = decode, (x, y)
        self.f = shared_ptr[capi.DecodeFloor](new capi.DecodeFloor(decode.d.get()[0], <const char*><uintptr_t>x.data_ptr(),
                                                                   <char*><uintptr_t>y.data_ptr()))

    def run(self, int steps):
        cdef capi.Status s
        self.decode.borrow("decode_floor")
        with nogil:
            s = self.f.get().run(steps)
        _left(self.decode.comm)
        if s.code != capi.Code.ok:
            self.decode.fail(_failure(s), "decode_floor")

    def latency(self, int rounds):
        cdef capi.Status s
        self.decode.borrow("decode_floor")
        with nogil:
            s = self.f.get().latency(rounds)
        _left(self.decode.comm)
        if s.code != capi.Code.ok:
            self.decode.fail(_failure(s), "decode_floor")


def decode_bytes(rank, size, ranks_per_node, hidden, dtype, num_experts, top_k, max_tokens):
    return capi.Decode.bytes(_geometry(rank, size, ranks_per_node), _shape(hidden, dtype, num_experts, top_k, max_tokens, 1, 0))
