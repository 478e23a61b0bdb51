# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The memory of dispatch and combine in the cpu world: convert arguments, release the GIL, make one call.

moecomm.buffer documents and validates. Methods that begin with try_ are called first. They accept only arguments that
are certainly valid, in a fraction of the time of the checks in Python, and leave all others to these checks.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native.cpu_world.accounts cimport bytes_of, hops_of, named_spans
from moecomm._native.cpu_world.block cimport Block
from moecomm._native.cpu_world.calls cimport enter, refuse_closed
from moecomm._native.cpu_world.replica_request cimport ReplicaRequest
from moecomm._native.cpu_world.communicator cimport Communicator
from moecomm._native.cpu_world.faults cimport fault_of
from moecomm._native.cpu_world.first_phase cimport FirstPhase
from moecomm._native.cpu_world.plan cimport Plan
from moecomm._native.cpu_world.recording cimport Recording
from moecomm._native.shared.dlpack cimport DLTensor
from moecomm._native.shared.extents cimport are_apart, are_outside, extent_of
from moecomm._native.shared.status cimport failure_of
from moecomm._native.shared.structures cimport fill_combine, fill_dispatch, geometry_of, offsets_of, shape_of
from moecomm._native.shared.tensors cimport (
    FLOAT_CODE, make_rows, make_tensor, only_numbers, read_ids, read_matrix, read_rows, read_vector,
)


cdef class Buffer:
    def __cinit__(self, Communicator comm, hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes,
                  bint check, logical_experts=0):
        self.shape = shape_of(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts)
        self.comm = comm
        enter(comm.c.get(), "Buffer")
        with nogil:
            self.b = capi.make_buffer(comm.c, self.shape, check)
        self.windows.own = extent_of(self.b.get().window())

    def __dealloc__(self):
        with nogil:
            self.b.reset()

    cdef shared_ptr[capi.Buffer] borrow(self, str op) except *:
        """Return the native buffer for a call. It stays alive if this object is closed during the call."""
        if not self.b:
            refuse_closed(op, "buffer")
        enter(&self.b.get().comm(), op)
        return self.b

    def contact(self):
        return <bytes>self.b.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        cdef shared_ptr[capi.Buffer] held = self.borrow("Buffer")
        with nogil:
            held.get().connect(c)
            held.reset()
        self.comm.left()

    def finish_connect(self):
        self.b.get().finish_connect()

    def release(self):
        """Release the memory after a running call of another thread, or after the call that this thread is inside."""
        cdef shared_ptr[capi.Buffer] b = self.b
        self.b.reset()
        with nogil:
            if b:
                b.get().comm().calls().wait()
            b.reset()
        self.comm.left()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int tokens,
                 bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes,
                 Plan plan=None, int scale_kind=0, bint scales_by_column=False, ReplicaRequest request=None,
                 uint32_t routing=0, FirstPhase first=None):
        """Return (Plan, Block of the rows, Block of the output) or a Failure.

        request: ids are logical experts; their slots are written to it. first: gets the counts when they are known.
        """
        cdef capi.DispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("dispatch")
        cdef capi.Buffer* buffer = held.get()
        fill_dispatch(&call, x, scales, ids, ids_are_int32, weights, tokens, by_rank, alignment, capacity, row_bytes,
                      scale_bytes, scale_kind, scales_by_column, routing)
        call.cached = plan is not None
        if request is not None:
            request.ask(&call)
        if plan is None:
            plan = Plan.__new__(Plan)
            plan.p = buffer.new_plan()
        cdef capi.FirstPhase* phase = NULL
        if first is not None:
            phase = first.begin(plan, out, output)
        with nogil:
            s = buffer.dispatch(call, plan.p.get()[0], out.b, output.b, phase)
            held.reset()
        self.comm.left()
        return failure_of(s) or (plan, out, output)

    def choose(self, uintptr_t ids, int tokens, ReplicaRequest request):
        """Choose the slots of logical ids, for a call that takes slots. Return None or a Failure.

        Collective if the choice needs the picks of all ranks.
        """
        cdef capi.DispatchCall call
        cdef capi.Status s
        fill_dispatch(&call, 0, 0, ids, False, 0, tokens, False, 0, -1, 0, 0, 0, False, 0)   # it moves no rows
        request.ask(&call)
        cdef shared_ptr[capi.Buffer] held = self.borrow("dispatch")
        with nogil:
            s = held.get().choose(call)
            held.reset()
        self.comm.left()
        return failure_of(s)

    def combine(self, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias, int64_t bias_stride, Plan plan,
                Block output, uintptr_t back=0, uintptr_t slots=0, int wire=0, bint sums_back=False):
        """Return None or a Failure.

        back: f32 per row (in the rank layout, per row and pick) to send back to slots [T, K]; summed with sums_back.
        """
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("combine")
        cdef capi.Buffer* buffer = held.get()
        fill_combine(&call, rows, weights, y, bias, bias_stride, back, slots, wire, sums_back)
        with nogil:
            s = buffer.combine(call, plan.p.get()[0], output.b.get()[0])
            held.reset()
        self.comm.left()
        return failure_of(s)

    def refuse(self, str verb, uint64_t epoch, int why):
        """Take part in a "dispatch", "choose" or "combine" that this rank refuses, to report the refusal to its peers.

        Return None or a Failure. A Failure that keeps the ranks in step is the result of the call on every rank; with
        any other one, the refusal may not have reached all ranks. epoch: unused here. why: a number of capi.Why.
        """
        cdef capi.DispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef Plan plan = Plan.__new__(Plan)
        cdef capi.Status s
        cdef bint combines = verb == "combine", chooses = verb == "choose"
        cdef shared_ptr[capi.Buffer] held = self.borrow(verb)
        call.refused = <capi.Why>why
        plan.p = held.get().new_plan()
        with nogil:
            if combines:
                s = held.get().refuse_combine(<capi.Why>why)
            elif chooses:
                s = held.get().choose(call)
            else:
                s = held.get().dispatch(call, plan.p.get()[0], out.b, output.b)
            held.reset()
        self.comm.left()
        return failure_of(s)

    def try_dispatch(self, x, topk_ids, topk_weights, layout, alignment):
        """Dispatch with default options. Return None if the arguments need the checks in Python.

        Otherwise return (Plan, Block of the rows, Block of the output, number of rows, x, weights) or a Failure. x and
        weights are tensors that nearly every caller reads, or None.
        """
        cdef DLTensor rows, ids, weights
        cdef capi.DispatchCall call
        cdef Block out, output
        cdef Plan plan
        cdef capi.Status s
        cdef int64_t received
        cdef shared_ptr[capi.Buffer] held = self.borrow("dispatch")
        cdef capi.Buffer* buffer = held.get()
        if type(layout) is not str or type(alignment) is not int:
            return None
        cdef bint by_rank = <str>layout == "rank"
        if not by_rank and <str>layout != "expert" or not 1 <= alignment <= (1 if by_rank else 65536):
            return None
        if not only_numbers(x, topk_weights) or not read_rows(x, &rows, &self.shape):
            return None
        if rows.shape[0] > self.shape.max_tokens:
            return None
        if not read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != rows.shape[0]:
            return None
        if topk_weights is not None:
            if not read_matrix(topk_weights, &weights, self.shape.top_k, FLOAT_CODE, 32):
                return None
            if weights.shape[0] != rows.shape[0]:
                return None
            call.weights = <const float*>weights.data
        call.x = <const char*>rows.data
        call.tokens = rows.shape[0]
        call.shape.layout = capi.RowLayout.rank if by_rank else capi.RowLayout.expert
        call.shape.alignment = alignment
        call.shape.row_bytes = self.shape.combine_row_bytes()
        out, output, plan = Block.__new__(Block), Block.__new__(Block), Plan.__new__(Plan)
        plan.p = buffer.new_plan()
        with nogil:
            s = buffer.dispatch(call, plan.p.get()[0], out.b, output.b)
            received = buffer.local_rows(plan.p.get()[0]) if s.code == capi.Code.ok else 0
            held.reset()
        self.comm.left()
        if s.code != capi.Code.ok:
            return failure_of(s)
        cdef capi.BlockLayout at = capi.block_layout(received, plan.p.get().view.call, self.shape.top_k)
        cdef char* data = out.b.get().data()
        made, made_weights = None, None
        if received:
            made = make_rows(out, data + at.rows, &self.shape, received, NULL)
            if call.weights != NULL and not by_rank:
                made_weights = make_tensor(out, data + at.weights, FLOAT_CODE, 32, received, 0, NULL)
        return plan, out, output, received, made, made_weights

    def try_combine(self, rows, Plan plan not None, Block output not None, int64_t num_rows, int64_t num_tokens,
                    topk_weights, out):
        """Combine with default options. Return y or a Failure, or None if the arguments need the checks in Python."""
        cdef DLTensor terms, weights, y
        cdef int64_t y_bytes
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("combine")
        cdef capi.Buffer* buffer = held.get()
        if not only_numbers(rows, topk_weights):
            return None
        if not read_rows(rows, &terms, &self.shape) or terms.shape[0] != num_rows:
            return None
        if topk_weights is not None:
            if plan.p.get().view.call.layout == capi.RowLayout.rank:
                return None
            if not read_vector(topk_weights, &weights, num_rows):
                return None
            # Rows may be staged in the output.
            if not are_apart(weights.data, 4 * num_rows, output.b.get().data(), output.b.get().bytes()):
                return None
            call.weights = <const float*>weights.data
        call.rows = <const char*>terms.data
        if out is None:
            out = make_rows(None, NULL, &self.shape, num_tokens, &call.y)
            if out is None:
                return None
        else:
            if not read_rows(out, &y, &self.shape) or y.shape[0] != num_tokens:
                return None
            y_bytes = num_tokens * self.shape.combine_row_bytes()
            if not are_apart(y.data, y_bytes, terms.data, num_rows * self.shape.combine_row_bytes()):
                return None
            if not are_outside(self.windows, y.data, y_bytes):
                return None
            if call.weights != NULL and not are_apart(y.data, y_bytes, weights.data, 4 * num_rows):
                return None
            call.y = <char*>y.data
        with nogil:
            s = buffer.combine(call, plan.p.get()[0], output.b.get()[0])
            held.reset()
        self.comm.left()
        return out if s.code == capi.Code.ok else failure_of(s)

    def owns(self, Plan plan):
        return plan.p.get().owner == <const void*>self.b.get()

    def block_layout(self, Plan plan, uint64_t rows, uint64_t row_bytes, uint64_t scale_bytes,
                     bint scales_by_column=False):
        """Return the offsets of rows, scales, weights, ids and source in the block of a dispatch of such rows."""
        return offsets_of(plan.p.get().view.call, rows, row_bytes, scale_bytes, scales_by_column, self.shape.top_k)

    def window(self):
        """Return (address, bytes) of the window."""
        return <uintptr_t>self.windows.own.data, self.windows.own.size

    def arena(self):
        """Return (bytes of held blocks, number of held blocks, bytes of the arena)."""
        if not self.b:   # another thread has closed it while a call failed
            return 0, 0, 0
        return self.b.get().arena().held_bytes(), self.b.get().arena().held_blocks(), self.b.get().arena().capacity()

    def counters(self):
        """Return the traffic since the last take_counters.

        It is the logical and physical rows and bytes of the rail, those of the node, and the replicated rows.
        """
        cdef capi.Counters c
        cdef shared_ptr[capi.Buffer] held = self.borrow("stats")
        with nogil:
            c = held.get().counters()
            held.reset()
        self.comm.left()
        return hops_of(c)

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[capi.Buffer] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
            held.reset()
        self.comm.left()
        return c

    def trace(self, bint on):
        """Start or stop the timeline of roles."""
        cdef shared_ptr[capi.Buffer] held = self.borrow("trace")
        with nogil:
            held.get().trace(on)
            held.reset()
        self.comm.left()

    def record(self, Recording recording):
        """Record later calls and their roles; None: stop."""
        cdef shared_ptr[capi.Recording] r
        if recording is not None:
            r = recording.r
        cdef shared_ptr[capi.Buffer] held = self.borrow("record")
        with nogil:
            held.get().record(r)
            held.reset()
        self.comm.left()

    def take(self, Recording recording):
        """Return the recording since the last take as bytes.

        It is a tuple of calls (C++ RecordedCall), picks, weights and spans of roles (C++ RoleSpan).
        """
        cdef capi.RecordingSegment s
        cdef shared_ptr[capi.Buffer] held = self.borrow("record")
        with nogil:
            s = held.get().take(recording.r.get()[0])
            held.reset()
        self.comm.left()
        cdef bytes ids
        if s.ids32.size():
            ids = bytes_of(s.ids32.data(), 4 * s.ids32.size())
        else:
            ids = bytes_of(s.ids16.data(), 2 * s.ids16.size())
        return (bytes_of(s.calls.data(), sizeof(capi.RecordedCall) * s.calls.size()), ids,
                bytes_of(s.weights.data(), 4 * s.weights.size()),
                bytes_of(s.spans.data(), sizeof(capi.RoleSpan) * s.spans.size()))

    def take_timeline(self):
        """Return [(role, begin, end)] since the last call, in seconds of time.perf_counter()."""
        cdef vector[capi.RoleSpan] spans
        cdef shared_ptr[capi.Buffer] held = self.borrow("trace")
        with nogil:
            spans = held.get().take_timeline()
            held.reset()
        self.comm.left()
        return named_spans(spans)

    def rail_is_mapped(self):
        """Whether UCX has mapped the memory of the rail peers (nodes on one host), so that puts are stores."""
        return self.b.get().rail_is_mapped()

    def set_stream_threshold(self, uint64_t bytes):
        self.b.get().set_stream_threshold(bytes)

    def set_fault(self, str point, str action, int64_t passes=0, str phase="none"):
        """Inject a fault into the calls of this rank, at "put", "copy", "reduce" or "wait". For tests.

        The first `passes` passes of this point are unaffected. Then a row is damaged ("damage") or omitted ("omit"), or
        the process stops ("stop") or ends ("kill").
        """
        self.b.get().set_fault(fault_of(point, action, passes, phase))


def buffer_bytes(rank, size, ranks_per_node, hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes,
                 logical_experts=0):
    return capi.Buffer.bytes(
        geometry_of(rank, size, ranks_per_node),
        shape_of(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts),
    )
