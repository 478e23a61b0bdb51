# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The cpu world, thinly: marshal, release the GIL, make one call. moecomm.* documents and validates."""
import threading

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_Clear
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libcpp cimport bool
from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi

# By the numbers of capi.Code and capi.Phase.
_CODES = ("ok", "invalid", "timeout", "lost", "capacity", "mismatch", "corrupt", "interrupted")
PHASES = ("none", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done", "flush")
# By the numbers of capi.RoleKind, in the order in which a token meets them.
ROLES = ("plan", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done",
         "list", "decode send", "decode announce", "decode accept", "decode pack", "decode answer", "decode wait", "decode sum")

# By the numbers of capi.FaultPoint and capi.FaultAction.
_POINTS = ("none", "put", "copy", "reduce", "wait")
_ACTIONS = ("damage", "omit", "stop", "kill")


cdef list _named(vector[capi.RoleSpan]& spans):
    return [(ROLES[<int>s.role], s.begin * 1e-9, s.end * 1e-9) for s in spans]


cdef class Failure:
    """A Status that is not ok, as Python sees it."""
    cdef readonly str code, phase
    cdef readonly int peer, detail, reporter   # reporter: the rank that told this one, -1: found out here
    cdef readonly object expected, got


# Python runs its signal handlers on the main thread, between two of its instructions: a main thread that waits here asks for them.
cdef extern from "Python.h":
    int _run_signal_handlers "PyErr_CheckSignals"() noexcept

cdef extern from "<pthread.h>" nogil:
    unsigned long pthread_self()

cdef unsigned long _main_thread = threading.main_thread().ident


cdef bool _interrupted() noexcept nogil:
    if pthread_self() != _main_thread:
        return False
    with gil:
        return _run_signal_handlers() != 0   # the exception stays set: _failure raises it

capi.interrupted = _interrupted


cdef int _raise_what_is_set() except? 0:
    return 0


cdef Failure _failure(const capi.Status& s):
    if s.code == capi.Code.interrupted:
        _raise_what_is_set()
    cdef Failure f = Failure.__new__(Failure)
    f.code = _CODES[<int>s.code]
    f.phase = PHASES[<int>s.phase]
    f.peer = s.peer
    f.detail = s.detail
    f.expected = s.expected
    f.got = s.got
    f.reporter = s.reporter
    return f


cdef capi.Shape _shape(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts=0):
    cdef capi.Shape s
    s.hidden = hidden
    s.dtype = <capi.DType><int>dtype
    s.num_experts = num_experts
    s.top_k = top_k
    s.max_tokens = max_tokens
    s.channels = channels
    s.arena_bytes = arena_bytes
    s.logical_experts = logical_experts
    return s


cdef capi.Geometry _geometry(rank, size, ranks_per_node):
    cdef capi.Geometry g
    g.rank = rank
    g.size = size
    g.ranks_per_node = ranks_per_node
    return g


cdef class Communicator:
    cdef shared_ptr[capi.Communicator] c

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
        self.c.get().abort(rank)

    def broken(self):
        cdef capi.Status s = self.c.get().broken()
        return None if s.code == capi.Code.ok else _failure(s)

    def note(self, failure):
        """A Failure of the cuda world: one that is final ends this communicator."""
        cdef capi.Status s
        s.code = <capi.Code><int>_CODES.index(failure.code)
        s.phase = <capi.Phase><int>PHASES.index(failure.phase)
        s.peer, s.detail, s.expected, s.got, s.reporter = failure[2:]
        if capi.is_final(s):
            self.c.get().mark_broken(s)

    def release(self):
        with nogil:
            self.c.reset()


@cython.freelist(8)
cdef class Block:
    """A piece of the window that tensors are views of; freed with the last of them."""
    cdef shared_ptr[capi.Block] b

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.b.get().data(), self.b.get().bytes(), 0, flags)

    @property
    def nbytes(self):
        return self.b.get().bytes()

    @property
    def address(self):
        return <uintptr_t>self.b.get().data()


@cython.freelist(8)
cdef class Plan:
    """Where every row of one routing goes. Keeps nothing of the window."""
    cdef shared_ptr[capi.Plan] p

    @property
    def tokens(self):
        return self.p.get().view.tokens

    def rows(self, int local_rank):
        cdef capi.CallShape* call = &self.p.get().view.call
        return call.capacity if call.capacity >= 0 else self.p.get().view.rank_rows[local_rank]

    def real_rows(self, int local_rank):
        return self.p.get().view.rank_rows[local_rank]

    def tokens_per_expert(self, int n):
        return [self.p.get().view.tokens_per_expert[i] for i in range(n)]

    def rows_per_expert(self, int n):
        return [self.p.get().view.rows_per_expert[i] for i in range(n)]

    @property
    def by_rank(self):
        return self.p.get().view.call.layout == capi.RowLayout.rank


include "choice.pxi"
include "tensors.pxi"
include "recording.pxi"
include "results.pxi"


cdef capi.Fault _fault(str point, str action, int64_t passes, str phase):
    cdef capi.Fault fault
    fault.point = <capi.FaultPoint><int>_POINTS.index(point)
    fault.action = <capi.FaultAction><int>_ACTIONS.index(action)
    fault.phase = <capi.Phase><int>PHASES.index(phase)
    fault.passes = passes
    return fault


cdef tuple _hops(const capi.Counters& c):
    return (c.rail.logical_rows, c.rail.physical_rows, c.rail.logical_bytes, c.rail.physical_bytes,
            c.node.logical_rows, c.node.physical_rows, c.node.logical_bytes, c.node.physical_bytes, c.replicated_rows)


cdef class Buffer:
    cdef shared_ptr[capi.Buffer] b
    cdef capi.Shape shape

    def __cinit__(self, Communicator comm, hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, bint check, logical_experts=0):
        self.shape = _shape(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts)
        with nogil:
            self.b = make_shared[capi.Buffer](comm.c, self.shape, check)

    def card(self):
        return <bytes>self.b.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        with nogil:
            self.b.get().connect(c)

    def connected(self):
        self.b.get().connected()

    def release(self):
        with nogil:
            self.b.reset()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int tokens,
                 bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes, Plan plan=None,
                 int scale_kind=0, bint scales_by_column=False, Chosen chosen=None):
        """(Plan, Block of the rows, Block of the output) or a Failure. chosen: ids are logical, and their slots are written there."""
        cdef capi.DispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef capi.Status s
        cdef capi.Buffer* buffer = self.b.get()
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
        with nogil:
            s = self.b.get().choose(call)
        return None if s.code == capi.Code.ok else _failure(s)

    def combine(self, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias, int64_t bias_stride, Plan plan, Block output,
                uintptr_t back=0, uintptr_t slots=0, int wire=0):
        """None or a Failure. back: f32 per row (and slot, in the rank layout) that go to slots [T, K]."""
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef capi.Buffer* buffer = self.b.get()
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
        return None if s.code == capi.Code.ok else _failure(s)

    def try_dispatch(self, owner, x, topk_ids, topk_weights, layout, alignment):
        """A Dispatched; None where an argument needs a closer look. The call's other arguments are left out. Raises what owner._fail does."""
        cdef DLTensor rows, ids, weights
        cdef capi.DispatchCall call
        cdef Block out, output
        cdef Plan plan
        cdef capi.Status s
        cdef capi.Buffer* buffer = self.b.get()
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
        if s.code != capi.Code.ok:
            owner._fail("dispatch", _failure(s))
        return _dispatched(owner, layout, plan, out, output, self.shape, buffer.local_rows(plan.p.get()[0]), call.weights != NULL)

    def try_combine(self, owner, rows, handle, topk_weights, out):
        """y; None where something needs a closer look. The call's other arguments are left out. Raises what owner._fail does."""
        cdef DLTensor terms, weights, y
        cdef Plan plan
        cdef Block output
        cdef int64_t num_rows, num_tokens
        cdef capi.CombineCall call
        cdef capi.Status s
        cdef capi.Buffer* buffer = self.b.get()
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
            call.weights = <const float*>weights.data
        call.rows = <const char*>terms.data
        if out is None:
            out = _rows_at(None, NULL, &self.shape, num_tokens, &call.y)
            if out is None:
                return None
        else:
            if not _read_rows(out, &y, &self.shape) or y.shape[0] != num_tokens:
                return None
            call.y = <char*>y.data
            if not _apart(y.data, num_tokens * self.shape.combine_row_bytes(), terms.data, num_rows * self.shape.combine_row_bytes()):
                return None
        with nogil:
            s = buffer.combine(call, plan.p.get()[0], output.b.get()[0])
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

    def arena(self):
        """(bytes held, blocks held, bytes in all)"""
        return self.b.get().arena().held_bytes(), self.b.get().arena().held_blocks(), self.b.get().arena().capacity()

    def counters(self):
        """What moved since the last take_counters: logical and physical rows and bytes of the rail, of the node; replicated rows."""
        cdef capi.Counters c
        with nogil:
            c = self.b.get().counters()
        return _hops(c)

    def take_counters(self):
        cdef capi.Counters c
        with nogil:
            c = self.b.get().take_counters()
        return c

    def trace(self, bint on):
        """Start a timeline of roles, or end it."""
        with nogil:
            self.b.get().trace(on)

    def record(self, Recording recording):
        """Keep a recording of the calls and their roles from here on; None: no more."""
        cdef shared_ptr[capi.Recording] r
        if recording is not None:
            r = recording.r
        with nogil:
            self.b.get().record(r)

    def take(self, Recording recording):
        """What has been recorded since, as bytes: calls (C++ RecordedCall), picks, weights, spans of roles (C++ RoleSpan)."""
        cdef capi.RecordingSegment s
        with nogil:
            s = self.b.get().take(recording.r.get()[0])
        cdef bytes ids = _bytes_of(s.ids32.data(), 4 * s.ids32.size()) if s.ids32.size() else _bytes_of(s.ids16.data(), 2 * s.ids16.size())
        return (_bytes_of(s.calls.data(), sizeof(capi.RecordedCall) * s.calls.size()), ids, _bytes_of(s.weights.data(), 4 * s.weights.size()),
                _bytes_of(s.spans.data(), sizeof(capi.RoleSpan) * s.spans.size()))

    def take_timeline(self):
        """[(role, begin, end)] since the last call; seconds of time.perf_counter()."""
        cdef vector[capi.RoleSpan] spans
        with nogil:
            spans = self.b.get().take_timeline()
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


def ucx_version():
    return (<bytes>capi.UcxContext.version()).decode()


include "tools.pxi"
