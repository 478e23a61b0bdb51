# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The decode path on a GPU. moecomm.decode documents and validates; moecomm._cuda.decode passes the streams."""
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi
from moecomm._native.cuda_world.calls cimport Calls
from moecomm._native.cuda_world.counts cimport counts_of_traffic
from moecomm._native.cuda_world.decode_area cimport DecodeArea
from moecomm._native.cuda_world.peer_access cimport PeerAccess
from moecomm._native.cuda_world.spread cimport spread_of
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport fill_decode_combine, fill_decode_dispatch, geometry_from, shape_of


cdef class Decode:
    cdef shared_ptr[cudaapi.DeviceDecode] d
    cdef capi.Shape shape

    def __cinit__(self, geometry, PeerAccess peer_access, Calls calls, int device, hidden, dtype, num_experts, top_k,
                  max_tokens, bint check, spread, int stages, double timeout):
        cdef capi.Geometry g = geometry_from(geometry)
        cdef cudaapi.Spread s = spread_of(spread, stages)
        self.shape = shape_of(hidden, dtype, num_experts, top_k, max_tokens, 1, 0, 0)
        with nogil:
            self.d = make_shared[cudaapi.DeviceDecode](g, self.shape, check, device, peer_access.r, calls.c, s, timeout)

    def contact(self):
        return <bytes>self.d.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        with nogil:
            self.d.get().connect(c)

    def area(self, str name, int bank):
        """Return x, scales, rows or counts of the epochs of a parity, as bytes."""
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
        """Distance between the scales of two experts in bytes."""
        return cudaapi.decode_scale_area(self.d.get().view().geometry, self.shape)

    def rest(self):
        """As the cpu world's. Waits for the GPU."""
        cdef uint64_t latest, calls
        with nogil:
            latest = self.d.get().rest()
            calls = self.d.get().calls()
        return latest, calls

    def mask(self, list masked, uint64_t latest, uint64_t calls):
        """As the cpu world's."""
        cdef vector[uint8_t] table = masked
        with nogil:
            self.d.get().mask(table, latest, calls)

    @property
    def epoch(self):
        """Number of the latest dispatch."""
        return self.d.get().epoch()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights,
                 bint weighted, int tokens, int quant, bint by_column, bint receive, uintptr_t stream):
        """Enqueue on `stream`. Return None or a Failure."""
        cdef cudaapi.DeviceDecodeDispatch call
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        fill_decode_dispatch(<capi.DecodeDispatchCall*>&call, x, scales, ids, ids_are_int32, weights, weighted, tokens,
                             quant, by_column, receive)
        call.stream = <void*>stream
        with nogil:
            s = d.dispatch(call)
        return failure_of(s)

    def dispatch_receive(self, uint64_t epoch, uintptr_t stream):
        """Enqueue on `stream`. Return None or a Failure. Do nothing if the epoch is done already."""
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        with nogil:
            s = d.dispatch_receive(epoch, <void*>stream)
        return failure_of(s)

    def combine(self, uint64_t epoch, uintptr_t rows, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int wire,
                uintptr_t y, bint receive, uintptr_t stream):
        """Enqueue on `stream`. Return None or a Failure."""
        cdef cudaapi.DeviceDecodeCombine call
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        fill_decode_combine(<capi.DecodeCombineCall*>&call, epoch, rows, ids, ids_are_int32, weights, wire, y, receive)
        call.stream = <void*>stream
        with nogil:
            s = d.combine(call)
        return failure_of(s)

    def combine_receive(self, uint64_t epoch, uintptr_t stream):
        """Enqueue on `stream`. Return None or a Failure. Do nothing if the epoch is done already."""
        cdef capi.Status s
        cdef cudaapi.DeviceDecode* d = self.d.get()
        with nogil:
            s = d.combine_receive(epoch, <void*>stream)
        return failure_of(s)

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
        return failure_of(s)

    def fault(self):
        """As Buffer.fault()."""
        return failure_of(self.d.get().late_fault())

    def ended(self):
        """As Buffer.ended()."""
        return failure_of(self.d.get().ended())

    def stage(self, uint64_t epoch, uintptr_t stream):
        """Return the state of an epoch: 1: sent, 2: received, 3: sent back, 4: summed.

        0: a later epoch uses its memory, or it belongs to another capture.
        """
        return <int>self.d.get().stage(epoch, <void*>stream)

    def counters(self):
        """As Buffer.counters()."""
        return counts_of_traffic(self, self.d.get().counters())

    def take_counters(self):
        cdef capi.Counters c
        with nogil:
            c = self.d.get().take_counters()
        return c
