# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The memory of dispatch and combine on a GPU: convert arguments, release the GIL, make one call.

moecomm._cuda documents and validates.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi
from moecomm._native.cuda_world.block cimport Block
from moecomm._native.cuda_world.calls cimport Calls
from moecomm._native.cuda_world.counts cimport counts_of_traffic
from moecomm._native.cuda_world.plan cimport Plan
from moecomm._native.cuda_world.peer_access cimport PeerAccess
from moecomm._native.cuda_world.spread cimport spread_of
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport fill_combine, fill_dispatch, geometry_from, offsets_of, shape_of

from moecomm.errors import InvalidArgument


cdef class Buffer:
    cdef shared_ptr[cudaapi.DeviceBuffer] b
    cdef capi.Shape shape

    def __cinit__(self, geometry, PeerAccess peer_access, Calls calls, int device, hidden, dtype, num_experts, top_k,
                  max_tokens, channels, chunk_bytes, arena_bytes, bint check, spread, int stages, double timeout):
        cdef capi.Geometry g = geometry_from(geometry)
        cdef cudaapi.Spread s = spread_of(spread, stages)
        self.shape = shape_of(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, 0)
        self.shape.chunk_rows = max(1, chunk_bytes // self.shape.combine_row_bytes())
        with nogil:
            self.b = make_shared[cudaapi.DeviceBuffer](g, self.shape, check, device, peer_access.r, calls.c, s, timeout)

    cdef shared_ptr[cudaapi.DeviceBuffer] borrow(self, str op) except *:
        """Return the native buffer for a call. It stays alive if this object is closed during the call."""
        if not self.b:
            raise InvalidArgument(f"{op}: the buffer is closed", op=op)
        return self.b

    def __dealloc__(self):
        with nogil:
            self.b.reset()

    def contact(self):
        return <bytes>self.b.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        with nogil:
            self.b.get().connect(c)

    def finish_connect(self):
        pass

    def release(self):
        cdef shared_ptr[cudaapi.DeviceBuffer] b = self.b
        self.b.reset()
        with nogil:
            b.reset()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int tokens,
                 bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes, Plan plan,
                 int scale_kind, bint scales_by_column, uint32_t routing, uintptr_t stream):
        """Enqueue on `stream`. Return (Plan, Block of the rows, Block of the output) or a Failure."""
        cdef cudaapi.DeviceDispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("dispatch")
        cdef cudaapi.DeviceBuffer* buffer = held.get()
        fill_dispatch(<capi.DispatchCall*>&call, x, scales, ids, ids_are_int32, weights, tokens, by_rank, alignment,
                      capacity, row_bytes, scale_bytes, scale_kind, scales_by_column, routing)
        call.cached = plan is not None
        call.stream = <void*>stream
        if plan is None:
            plan = Plan.__new__(Plan)
            plan.p = buffer.new_plan()
        with nogil:
            s = buffer.dispatch(call, plan.p, out.b, output.b)
        return failure_of(s) or (plan, out, output)

    def combine(self, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias, int64_t bias_stride, Plan plan,
                Block output, uintptr_t back, uintptr_t slots, int wire, bint sums_back, uintptr_t stream):
        """Enqueue on `stream`. Return None or a Failure."""
        cdef cudaapi.DeviceCombineCall call
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("combine")
        cdef cudaapi.DeviceBuffer* buffer = held.get()
        fill_combine(<capi.CombineCall*>&call, rows, weights, y, bias, bias_stride, back, slots, wire, sums_back)
        call.stream = <void*>stream
        with nogil:
            s = buffer.combine(call, plan.p, output.b)
        return failure_of(s)

    def refuse(self, str verb, int why, uintptr_t stream):
        """As Buffer.refuse of the cpu world, for "dispatch" and "combine". Waits for `stream`."""
        cdef cudaapi.DeviceDispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef Plan plan = Plan.__new__(Plan)
        cdef capi.Status s
        cdef bint dispatches = verb == "dispatch"
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow(verb)
        cdef cudaapi.DeviceBuffer* buffer = held.get()
        call.refused = <capi.Why>why
        call.stream = <void*>stream
        plan.p = buffer.new_plan()
        with nogil:
            if dispatches:
                s = buffer.dispatch(call, plan.p, out.b, output.b)
            else:
                s = buffer.refuse_combine(<capi.Why>why, plan.p.get()[0], <void*>stream)
        return failure_of(s)

    def fault(self):
        """Return a failure of the earlier calls that is known now, or None.

        A final failure is returned every time, others once.
        """
        return failure_of(self.borrow("synchronize").get().late_fault())

    def ended(self):
        """Return the failure of the last call if it is known now and need not wait for the next call, or None."""
        return failure_of(self.borrow("a call").get().ended())

    def owns(self, Plan plan):
        return plan.p.get().owner == <const void*>self.b.get()

    def block_layout(self, Plan plan, uint64_t rows, uint64_t row_bytes, uint64_t scale_bytes,
                     bint scales_by_column=False):
        """Return the offsets of rows, scales, weights, ids and source in the block of a dispatch of such rows."""
        return offsets_of(plan.p.get().view.call, rows, row_bytes, scale_bytes, scales_by_column, self.shape.top_k)

    def window(self):
        """Return (address, bytes) of the window."""
        return <uintptr_t>self.b.get().window().data(), self.b.get().window().bytes()

    def arena(self):
        """Return (bytes of held blocks, number of held blocks, bytes of the arena)."""
        if not self.b:   # another thread has closed it while a call failed
            return 0, 0, 0
        return self.b.get().arena().held_bytes(), self.b.get().arena().held_blocks(), self.b.get().arena().capacity()

    def captured_bytes(self):
        """Return the bytes of the arena that calls in CUDA graphs use."""
        return self.b.get().captured_bytes()

    def release_captured(self):
        """Free the memory of captured calls. Graphs with calls of this buffer must not be replayed afterwards."""
        self.b.get().release_captured()

    def counters(self):
        """Return the traffic since the last take_counters, as device memory in the order of capi.Counters."""
        return counts_of_traffic(self, self.borrow("stats").get().counters())

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
        return c


def device_limits():
    """Return (limit of the shared memory of a block in bytes, number of multiprocessors) of the current device."""
    cdef int size = 0, sms = 0
    cdef int error = cudaapi.shared_bytes_limit(&size, &sms)
    if error:
        raise RuntimeError((<bytes>cudaapi.error_text(error)).decode())
    return size, sms


def shared_bytes(spread, int stages=3):
    """Return the bytes of shared memory of a block for (sms, warps, senders, stage bytes)."""
    return cudaapi.shared_bytes(spread_of(spread, stages))
