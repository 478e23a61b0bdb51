# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The cpu world, thinly: marshal, release the GIL, make one call. moecomm.* documents and validates."""
import contextlib
import threading

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_Clear
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libcpp cimport bool
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi

# By the numbers of capi.Code and capi.Phase.
_CODES = ("ok", "invalid", "timeout", "lost", "capacity", "mismatch", "corrupt", "interrupted", "refused", "out_of_step")
PHASES = ("none", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done", "flush")
# By the numbers of capi.RoleKind, in the order in which a token meets them.
ROLES = ("plan", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done",
         "list", "decode send", "decode announce", "decode accept", "decode pack", "decode answer", "decode wait", "decode sum")


cdef list _named(vector[capi.RoleSpan]& spans):
    return [(ROLES[<int>s.role], s.begin * 1e-9, s.end * 1e-9) for s in spans]


cdef class Failure:
    """A Status that is not ok, as Python sees it."""
    cdef readonly str code, phase
    cdef readonly int peer, detail, reporter   # reporter: the rank that told this one, -1: found out here
    cdef readonly object expected, got


cdef Failure _failure(const capi.Status& s):
    cdef Failure f = Failure.__new__(Failure)
    f.code = _CODES[<int>s.code]
    f.phase = PHASES[<int>s.phase]
    f.peer = s.peer
    f.detail = s.detail
    f.expected = s.expected
    f.got = s.got
    f.reporter = s.reporter
    return f


include "shapes.pxi"


cdef class Communicator:
    cdef shared_ptr[capi.Communicator] c
    cdef list put_off   # until the call ends that this process's main thread is inside

    def __cinit__(self, int rank, int size, int ranks_per_node, bint threads, str rail, double timeout):
        cdef capi.RailKind kind = capi.RailKind.none
        if rail == "loopback":
            kind = capi.RailKind.loopback
        elif rail == "ucx":
            kind = capi.RailKind.ucx
        self.c = shared_ptr[capi.Communicator](new capi.Communicator(_geometry(rank, size, ranks_per_node), threads, kind, timeout))

    def card(self):
        return <bytes>self.c.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        with nogil:
            self.c.get().connect(c)

    def abort(self, int rank):
        if self.c:   # not closed meanwhile
            self.c.get().abort(rank)

    def broken(self):
        cdef capi.Status s
        if self.c:
            s = self.c.get().broken()
        return None if s.code == capi.Code.ok else _failure(s)

    def note(self, failure):
        """A Failure of the cuda world: one that is final ends this communicator."""
        cdef capi.Status s
        s.code = <capi.Code><int>_CODES.index(failure.code)
        s.phase = <capi.Phase><int>PHASES.index(failure.phase)
        s.peer, s.detail, s.expected, s.got, s.reporter = failure[2:]
        if self.c and (capi.is_final(s) or capi.ends_late(s)):
            self.c.get().mark_broken(s)

    def running(self):
        """The call that this thread is inside, or None: while it waits, Python runs signal handlers and finalizers."""
        cdef const char* name = self.c.get().calls().running() if self.c else NULL
        return None if name == NULL else (<bytes>name).decode()

    def after_call(self, work):
        """Whether work() is put off until the call returns that this thread is inside; False: it is inside none."""
        if self.running() is None:
            return False
        self.put_off = [*(self.put_off or ()), work]
        return True

    cdef do_put_off(self):
        works, self.put_off = self.put_off, None
        with contextlib.ExitStack() as all_of_them:   # also where one raises
            for work in reversed(works):
                all_of_them.callback(work)

    def release(self):
        cdef shared_ptr[capi.Communicator] c = self.c
        self.c.reset()
        with nogil:
            if c:
                c.get().calls().wait()
            c.reset()
        _left(self)

    def __dealloc__(self):
        with nogil:
            self.c.reset()


include "calls.pxi"
include "plans.pxi"
include "choice.pxi"
include "tensors.pxi"
include "recording.pxi"
include "results.pxi"


cdef class Buffer:
    cdef shared_ptr[capi.Buffer] b
    cdef Communicator comm
    cdef capi.Shape shape
    cdef Windows windows

    def __cinit__(self, Communicator comm, hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, bint check, logical_experts=0):
        self.shape = _shape(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts)
        self.comm = comm
        _enter(comm.c.get(), "Buffer")
        with nogil:
            self.b = capi.make_buffer(comm.c, self.shape, check)
        self.windows.own = _extent(self.b.get().window())

    def __dealloc__(self):
        with nogil:
            self.b.reset()

    cdef shared_ptr[capi.Buffer] borrow(self, str op) except *:
        """The native buffer for the length of a call, during which this object may be closed."""
        if not self.b:
            _refuse_closed(op, "buffer")
        _enter(&self.b.get().comm(), op)
        return self.b

    def card(self):
        return <bytes>self.b.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        cdef shared_ptr[capi.Buffer] held = self.borrow("Buffer")
        with nogil:
            held.get().connect(c)
            held.reset()
        _left(self.comm)

    def connected(self):
        self.b.get().connected()

    def release(self):
        """Waits for a call of another thread. One that this thread is inside (or a later one of that thread) keeps the memory until its end."""
        cdef shared_ptr[capi.Buffer] b = self.b
        self.b.reset()
        with nogil:
            if b:
                b.get().comm().calls().wait()
            b.reset()
        _left(self.comm)

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int tokens,
                 bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes, Plan plan=None,
                 int scale_kind=0, bint scales_by_column=False, Chosen chosen=None):
        """(Plan, Block of the rows, Block of the output) or a Failure. chosen: ids are logical, and their slots are written there."""
        cdef capi.DispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("dispatch")
        cdef capi.Buffer* buffer = held.get()
        call.x = <const char*>x
        call.scales = <const char*>scales
        if ids_are_int32:
            call.ids32 = <const int32_t*>ids
        else:
            call.ids64 = <const int64_t*>ids
        call.weights = <const float*>weights
        call.tokens = tokens
        call.cached = plan is not None
        call.shape.layout = capi.RowLayout.rank if by_rank else capi.RowLayout.expert
        call.shape.alignment = alignment
        call.shape.capacity = capacity
        call.shape.row_bytes = row_bytes
        call.shape.scale_bytes = scale_bytes
        call.shape.scales = <capi.ScaleKind>scale_kind
        call.shape.scales_by_column = scales_by_column
        if chosen is not None:
            chosen.ask(&call)
        if plan is None:
            plan = Plan.__new__(Plan)
            plan.p = buffer.new_plan()
        with nogil:
            s = buffer.dispatch(call, plan.p.get()[0], out.b, output.b)
            held.reset()
        _left(self.comm)
        if s.code != capi.Code.ok:
            return _failure(s)
        return plan, out, output

    def choose(self, uintptr_t ids, int tokens, Chosen chosen):
        """None or a Failure: the slots of logical ids, for a call that knows of slots alone. Collective where the choice needs the picks of all."""
        cdef capi.DispatchCall call
        cdef capi.Status s
        call.ids64 = <const int64_t*>ids
        call.tokens = tokens
        call.shape.alignment = 0   # no dispatch calls so
        chosen.ask(&call)
        cdef shared_ptr[capi.Buffer] held = self.borrow("dispatch")
        with nogil:
            s = held.get().choose(call)
            held.reset()
        _left(self.comm)
        return None if s.code == capi.Code.ok else _failure(s)

    def combine(self, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias, int64_t bias_stride, Plan plan, Block output,
                uintptr_t back=0, uintptr_t slots=0, int wire=0):
        """None or a Failure. back: f32 per row (and slot, in the rank layout) that go to slots [T, K]."""
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("combine")
        cdef capi.Buffer* buffer = held.get()
        call.rows = <const char*>rows
        call.weights = <const float*>weights
        call.back = <const float*>back
        call.y = <char*>y
        call.slots = <float*>slots
        call.bias = <const float*>bias
        call.bias_stride = bias_stride
        call.wire = <capi.Wire>wire
        with nogil:
            s = buffer.combine(call, plan.p.get()[0], output.b.get()[0])
            held.reset()
        _left(self.comm)
        return None if s.code == capi.Code.ok else _failure(s)

    def try_dispatch(self, owner, x, topk_ids, topk_weights, layout, alignment):
        """A Dispatched; None where an argument needs a closer look. The call's other arguments are left out. Raises what owner._fail does."""
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
        if not _only_numbers(x, topk_weights) or not _read_rows(x, &rows, &self.shape) or rows.shape[0] > self.shape.max_tokens or (not by_rank and <str>layout != "expert"):
            return None
        if not _read_ids(topk_ids, &ids, self.shape.top_k, &call.ids64, &call.ids32) or ids.shape[0] != rows.shape[0]:
            return None
        if not 1 <= alignment <= (1 if by_rank else 65536):
            return None
        if topk_weights is not None:
            if not _read(topk_weights, &weights, self.shape.top_k, _FLOAT, 32) or weights.shape[0] != rows.shape[0]:
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
        _left(self.comm)
        if s.code != capi.Code.ok:
            owner._fail("dispatch", _failure(s))
        return _dispatched(owner, layout, plan, out, output, self.shape, received, call.weights != NULL)

    def try_combine(self, owner, rows, handle, topk_weights, out):
        """y; None where something needs a closer look. The call's other arguments are left out. Raises what owner._fail does."""
        cdef DLTensor terms, weights, y
        cdef Plan plan
        cdef Block output
        cdef int64_t num_rows, num_tokens, y_bytes
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef shared_ptr[capi.Buffer] held = self.borrow("combine")
        cdef capi.Buffer* buffer = held.get()
        if type(handle) is not _handle_type or not _only_numbers(rows, topk_weights):
            return None
        if handle._buffer is not owner or handle._made_plan is None:
            return None
        plan, output, num_rows, num_tokens = handle._made_plan, handle._made_output, handle.num_rows, handle.num_tokens
        if not _read_rows(rows, &terms, &self.shape) or terms.shape[0] != num_rows:
            return None
        if topk_weights is not None:
            if plan.p.get().view.call.layout == capi.RowLayout.rank or not _read_vector(topk_weights, &weights, num_rows):
                return None
            if not _apart(weights.data, 4 * num_rows, output.b.get().data(), output.b.get().bytes()):   # rows may be staged there
                return None
            call.weights = <const float*>weights.data
        call.rows = <const char*>terms.data
        if out is None:
            out = _rows_at(None, NULL, &self.shape, num_tokens, &call.y)
            if out is None:
                return None
        else:
            if not _read_rows(out, &y, &self.shape) or y.shape[0] != num_tokens:
                return None
            y_bytes = num_tokens * self.shape.combine_row_bytes()
            if (not _apart(y.data, y_bytes, terms.data, num_rows * self.shape.combine_row_bytes()) or not _outside(self.windows, y.data, y_bytes)
                    or call.weights != NULL and not _apart(y.data, y_bytes, weights.data, 4 * num_rows)):
                return None
            call.y = <char*>y.data
        with nogil:
            s = buffer.combine(call, plan.p.get()[0], output.b.get()[0])
            held.reset()
        _left(self.comm)
        if s.code != capi.Code.ok:
            owner._fail("combine", _failure(s))
        return out

    def owns(self, Plan plan):
        return plan.p.get().owner == <const void*>self.b.get()

    def block_layout(self, Plan plan, uint64_t rows, uint64_t row_bytes, uint64_t scale_bytes, bint scales_by_column=False):
        """Offsets of rows, scales, weights, ids and source in the block of a dispatch of such rows."""
        cdef capi.CallShape call = plan.p.get().view.call   # a plan may have been reused for other rows since
        call.row_bytes = row_bytes
        call.scale_bytes = scale_bytes
        call.scales_by_column = scales_by_column
        cdef capi.BlockLayout l = capi.block_layout(rows, call, self.shape.top_k)
        return l.rows, l.scales, l.weights, l.ids, l.source

    def window(self):
        """(address, bytes) of the memory that peers read."""
        return <uintptr_t>self.windows.own.data, self.windows.own.size

    def arena(self):
        """(bytes held, blocks held, bytes in all)"""
        if not self.b:   # closed from another thread while its call failed
            return 0, 0, 0
        return self.b.get().arena().held_bytes(), self.b.get().arena().held_blocks(), self.b.get().arena().capacity()

    def counters(self):
        """What moved since the last take_counters: logical and physical rows and bytes of the rail, of the node; replicated rows."""
        cdef capi.Counters c
        cdef shared_ptr[capi.Buffer] held = self.borrow("stats")
        with nogil:
            c = held.get().counters()
            held.reset()
        _left(self.comm)
        return _hops(c)

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[capi.Buffer] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
            held.reset()
        _left(self.comm)
        return c

    def trace(self, bint on):
        """Start a timeline of roles, or end it."""
        cdef shared_ptr[capi.Buffer] held = self.borrow("trace")
        with nogil:
            held.get().trace(on)
            held.reset()
        _left(self.comm)

    def record(self, Recording recording):
        """Keep a recording of the calls and their roles from here on; None: no more."""
        cdef shared_ptr[capi.Recording] r
        if recording is not None:
            r = recording.r
        cdef shared_ptr[capi.Buffer] held = self.borrow("record")
        with nogil:
            held.get().record(r)
            held.reset()
        _left(self.comm)

    def take(self, Recording recording):
        """What has been recorded since, as bytes: calls (C++ RecordedCall), picks, weights, spans of roles (C++ RoleSpan)."""
        cdef capi.RecordingSegment s
        cdef shared_ptr[capi.Buffer] held = self.borrow("record")
        with nogil:
            s = held.get().take(recording.r.get()[0])
            held.reset()
        _left(self.comm)
        cdef bytes ids = _bytes_of(s.ids32.data(), 4 * s.ids32.size()) if s.ids32.size() else _bytes_of(s.ids16.data(), 2 * s.ids16.size())
        return (_bytes_of(s.calls.data(), sizeof(capi.RecordedCall) * s.calls.size()), ids, _bytes_of(s.weights.data(), 4 * s.weights.size()),
                _bytes_of(s.spans.data(), sizeof(capi.RoleSpan) * s.spans.size()))

    def take_timeline(self):
        """[(role, begin, end)] since the last call; seconds of time.perf_counter()."""
        cdef vector[capi.RoleSpan] spans
        cdef shared_ptr[capi.Buffer] held = self.borrow("trace")
        with nogil:
            spans = held.get().take_timeline()
            held.reset()
        _left(self.comm)
        return _named(spans)

    def rail_is_mapped(self):
        """Whether UCX mapped the rail peers' memory (nodes on one host): puts are stores then."""
        return self.b.get().rail_is_mapped()

    def set_stream_threshold(self, uint64_t bytes):
        self.b.get().set_stream_threshold(bytes)

    def set_fault(self, str point, str action, int64_t passes=0, str phase="none"):
        """Tests only: at the point ("put", "copy", "reduce", "wait") of this rank's calls, passed unharmed `passes` times,
        a row is damaged or left out ("damage", "omit"), or the process stops or dies ("stop", "kill")."""
        self.b.get().set_fault(_fault(point, action, passes, phase))


include "decode.pxi"


def buffer_bytes(rank, size, ranks_per_node, hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts=0):
    return capi.Buffer.bytes(_geometry(rank, size, ranks_per_node),
                             _shape(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts))


def isa():
    """Which build of the row kernels this process uses."""
    return (<bytes>capi.row_kernels().name).decode()


include "tools.pxi"
