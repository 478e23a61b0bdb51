# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The decode path in the cpu world. moecomm.decode documents and validates.

With a few tokens per call, checks in Python take longer than the call. Methods that begin with try_ accept only tensors
that are certainly valid, and leave all others to these checks.
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native.cpu_world.accounts cimport hops_of, named_spans
from moecomm._native.cpu_world.buffer cimport Buffer
from moecomm._native.cpu_world.calls cimport enter
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.cpu_world.decode_area cimport DecodeArea
from moecomm._native.cpu_world.faults cimport fault_of
from moecomm._native.cpu_world.recording cimport Recording
from moecomm._native.shared.dlpack cimport DLTensor
from moecomm._native.shared.extents cimport are_apart, are_outside, extent_of
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport fill_decode_combine, fill_decode_dispatch, geometry_of, shape_of
from moecomm._native.shared.tensors cimport FLOAT_CODE, has_tangents, read_ids, read_matrix, read_rows


cdef class Decode:
    def __cinit__(self, Communicator comm, Buffer buffer, bint check, int max_tokens):
        self.shape = buffer.shape
        self.shape.max_tokens = max_tokens
        self.comm = comm
        enter(comm.c.get(), "decode")
        with nogil:
            self.d = capi.make_decode(comm.c, self.shape, check)
        buffer.windows.decode = extent_of(self.d.get().window())
        self.windows = buffer.windows

    def __dealloc__(self):
        with nogil:
            self.d.reset()

    cdef shared_ptr[capi.Decode] borrow(self, str op) except *:
        """As Buffer.borrow()."""
        enter(&self.d.get().comm(), op)
        return self.d

    def contact(self):
        return <bytes>self.d.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        cdef shared_ptr[capi.Decode] held = self.borrow("decode")
        with nogil:
            held.get().connect(c)
            held.reset()
        self.comm.left()

    def finish_connect(self):
        self.d.get().finish_connect()

    def area(self, str name, int parity):
        """Return x, scales, rows or counts of the epochs of a parity, as bytes."""
        cdef DecodeArea area = DecodeArea.__new__(DecodeArea)
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
        """Distance between the scales of two experts in bytes."""
        return self.d.get().scale_area()

    def try_dispatch(self, x, topk_ids, topk_weights, int quant, bint receive):
        """Return (epoch, tokens) or a Failure, or None if the arguments need the checks in Python."""
        cdef DLTensor rows, ids, weights
        cdef capi.DecodeDispatchCall call
        if has_tangents() or not read_rows(x, &rows, &self.shape) or rows.shape[0] > self.shape.max_tokens:
            return None
        if not read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != rows.shape[0]:
            return None
        if topk_weights is not None:
            if not read_matrix(topk_weights, &weights, self.shape.top_k, FLOAT_CODE, 32):
                return None
            if weights.shape[0] != rows.shape[0]:
                return None
            call.weights = <const float*>weights.data
            call.weighted = True
        call.x = <const char*>rows.data
        call.tokens = rows.shape[0]
        call.quant = <capi.ScaleKind>quant
        call.receive = receive
        return self.run_dispatch(call)

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights,
                 bint weighted, int tokens, int quant, bint by_column, bint receive):
        """Return (epoch, tokens) or a Failure."""
        cdef capi.DecodeDispatchCall call
        fill_decode_dispatch(&call, x, scales, ids, ids_are_int32, weights, weighted, tokens, quant, by_column, receive)
        return self.run_dispatch(call)

    cdef object run_dispatch(self, const capi.DecodeDispatchCall& call):
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_dispatch")
        cdef uint64_t epoch = 0
        with nogil:
            s = held.get().dispatch(call, epoch)
            held.reset()
        self.comm.left()
        return (epoch, call.tokens) if s.code == capi.Code.ok else failure_of(s)

    def dispatch_receive(self, uint64_t epoch):
        """Return None or a Failure. Do nothing if the epoch is received already."""
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_dispatch")
        with nogil:
            s = held.get().dispatch_receive(epoch)
            held.reset()
        self.comm.left()
        return failure_of(s)

    def try_combine(self, uint64_t epoch, int tokens, bint weights_travel, topk_ids, topk_weights, out, bint receive):
        """Combine the rows in the area "rows" of an epoch.

        Return True or a Failure, or None if the arguments need the checks in Python.
        """
        cdef DLTensor ids, weights, y
        cdef capi.DecodeCombineCall call
        if has_tangents() or self.d.get().stage(epoch) != capi.DecodeStage.received:
            return None
        if not read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != tokens:
            return None
        if topk_weights is not None:
            if weights_travel or not read_matrix(topk_weights, &weights, self.shape.top_k, FLOAT_CODE, 32):
                return None
            if weights.shape[0] != tokens:
                return None
            call.weights = <const float*>weights.data
        if not read_rows(out, &y, &self.shape) or y.shape[0] != tokens:
            return None
        cdef uint64_t y_bytes = tokens * self.shape.combine_row_bytes()
        cdef int64_t picks = ids.shape[0] * ids.shape[1]
        if not are_outside(self.windows, y.data, y_bytes):
            return None
        if not are_apart(y.data, y_bytes, ids.data, picks * (ids.dtype.bits // 8)):
            return None
        if call.weights != NULL and not are_apart(y.data, y_bytes, call.weights, 4 * picks):
            return None
        call.epoch = epoch
        call.rows = self.d.get().rows(epoch & 1)
        call.y = <char*>y.data
        call.receive = receive
        return self.run_combine(call)

    def combine(self, uint64_t epoch, uintptr_t rows, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int wire,
                uintptr_t y, bint receive):
        """Return True or a Failure."""
        cdef capi.DecodeCombineCall call
        fill_decode_combine(&call, epoch, rows, ids, ids_are_int32, weights, wire, y, receive)
        return self.run_combine(call)

    cdef object run_combine(self, const capi.DecodeCombineCall& call):
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_combine")
        with nogil:
            s = held.get().combine(call)
            held.reset()
        self.comm.left()
        return True if s.code == capi.Code.ok else failure_of(s)

    def combine_receive(self, uint64_t epoch):
        """Return None or a Failure. Do nothing if the epoch is summed already."""
        cdef capi.Status s
        cdef shared_ptr[capi.Decode] held = self.borrow("decode_combine")
        with nogil:
            s = held.get().combine_receive(epoch)
            held.reset()
        self.comm.left()
        return failure_of(s)

    def rest(self):
        """(the highest epoch, the highest number of a call) that this rank may have used. It is in no call."""
        cdef uint64_t latest
        cdef shared_ptr[capi.Decode] held = self.borrow("mask")
        with nogil:
            latest = held.get().rest()
            held.reset()
        self.comm.left()
        return latest, self.comm.calls_begun()

    def mask(self, list masked, uint64_t latest, uint64_t calls):
        """Go on without these ranks. masked: by rank, 0 or 1. latest, calls: the highest of all ranks that rest."""
        cdef vector[uint8_t] table = masked
        cdef shared_ptr[capi.Decode] held = self.borrow("mask")
        with nogil:
            held.get().mask(table, latest, calls)
            held.reset()
        self.comm.left()

    @property
    def epoch(self):
        """Number of the latest dispatch."""
        return self.d.get().epoch() if self.d else 0

    def refuse(self, str verb, uint64_t epoch, int why):
        """As Buffer.refuse, for a "decode_dispatch" or the "decode_combine" of an epoch.

        Do nothing if the epoch is not open for a combine.
        """
        cdef capi.DecodeDispatchCall call
        cdef capi.Status s
        cdef bint dispatches = verb == "decode_dispatch"
        cdef shared_ptr[capi.Decode] held = self.borrow(verb)
        call.refused = <capi.Why>why
        with nogil:
            s = held.get().dispatch(call, epoch) if dispatches else held.get().refuse_combine(epoch, <capi.Why>why)
            held.reset()
        self.comm.left()
        return None if capi.keeps_step(s) else failure_of(s)

    def trace(self, bint on):
        """Start or stop the timeline of roles."""
        cdef shared_ptr[capi.Decode] held = self.borrow("trace")
        with nogil:
            held.get().trace(on)
            held.reset()
        self.comm.left()

    def take_timeline(self):
        """As Buffer.take_timeline()."""
        cdef vector[capi.RoleSpan] spans
        cdef shared_ptr[capi.Decode] held = self.borrow("trace")
        with nogil:
            spans = held.get().take_timeline()
            held.reset()
        self.comm.left()
        return named_spans(spans)

    def record(self, Recording recording not None):
        """Record later calls there."""
        cdef shared_ptr[capi.Recording] r = recording.r
        cdef shared_ptr[capi.Decode] held = self.borrow("record")
        with nogil:
            held.get().record(r)
            held.reset()
        self.comm.left()

    def stage(self, uint64_t epoch):
        """Return the state of an epoch: 0: overwritten, 1: sent, 2: received, 3: sent back, 4: summed."""
        return <int>self.d.get().stage(epoch)

    def counters(self):
        """As Buffer.counters()."""
        cdef capi.Counters c
        cdef shared_ptr[capi.Decode] held = self.borrow("stats")
        with nogil:
            c = held.get().counters()
            held.reset()
        self.comm.left()
        return hops_of(c)

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[capi.Decode] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
            held.reset()
        self.comm.left()
        return c

    def set_stream_threshold(self, uint64_t bytes):
        self.d.get().set_stream_threshold(bytes)

    def set_fault(self, str point, str action, int64_t passes=0, str phase="none"):
        """As Buffer.set_fault, in the decode path. For tests."""
        self.d.get().set_fault(fault_of(point, action, passes, phase))


def decode_bytes(rank, size, ranks_per_node, hidden, dtype, num_experts, top_k, max_tokens):
    return capi.Decode.bytes(
        geometry_of(rank, size, ranks_per_node), shape_of(hidden, dtype, num_experts, top_k, max_tokens, 1, 0, 0)
    )
