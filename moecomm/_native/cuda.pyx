"""The CUDA runtime for Python: marshal, release the GIL, make one call. moecomm.cuda documents and validates."""
from collections import namedtuple

from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libcpp cimport bool  # no-cython-lint - used by the included text
from libcpp.memory cimport make_shared, shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi, cudaapi

from moecomm.errors import InvalidArgument

# By the numbers of capi.Code and capi.Phase.
_CODES = ("ok", "invalid", "timeout", "lost", "capacity", "mismatch", "corrupt", "interrupted", "refused", "out_of_step")
_PHASES = ("none", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done", "flush")

Failure = namedtuple("Failure", "code phase peer detail expected got reporter")


cdef _failure(const capi.Status& s):
    if s.code == capi.Code.ok:
        return None
    return Failure(_CODES[<int>s.code], _PHASES[<int>s.phase], s.peer, s.detail, s.expected, s.got, s.reporter)


cdef class Block:
    """A piece of the window that tensors are views of; freed with the last of them."""
    cdef shared_ptr[cudaapi.DeviceBlock] b

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.b.get().bytes(),), "typestr": "|u1", "data": (<uintptr_t>self.b.get().data(), False), "version": 3}

    @property
    def nbytes(self):
        return self.b.get().bytes()

    @property
    def address(self):
        return <uintptr_t>self.b.get().data()


cdef class Counts:
    """int64 counts in device memory, of a plan or of what moved."""
    cdef shared_ptr[cudaapi.DevicePlan] p
    cdef object owner
    cdef int64_t* data
    cdef int n

    @property
    def __cuda_array_interface__(self):
        return {"shape": (self.n,), "typestr": "<i8", "data": (<uintptr_t>self.data, False), "version": 3}


cdef Counts _counters(owner, const capi.Counters* counters):
    cdef Counts c = Counts.__new__(Counts)
    c.owner = owner
    c.data = <int64_t*>counters
    c.n = sizeof(capi.Counters) // 8
    return c


cdef class Plan:
    """Where every row of one routing goes, in device memory."""
    cdef shared_ptr[cudaapi.DevicePlan] p

    @property
    def tokens(self):
        return self.p.get().view.tokens

    def rows(self, int local_rank):
        return self.p.get().num_rows

    def tokens_per_expert(self, int n):
        return self._counts(n, False)

    def rows_per_expert(self, int n):
        return self._counts(n, True)

    cdef _counts(self, int n, bint padded):
        cdef Counts c = Counts.__new__(Counts)
        c.p = self.p
        c.data = self.p.get().view.rows_per_expert if padded else self.p.get().view.tokens_per_expert
        c.n = n
        return c

    @property
    def by_rank(self):
        return self.p.get().view.call.layout == capi.RowLayout.rank


cdef class Reach:
    """How the ranks of a communicator reach each other's windows."""
    cdef shared_ptr[cudaapi.DeviceReach] r

    @staticmethod
    def threads(int device):
        """Ranks of one process, by pointer."""
        cdef Reach reach = Reach.__new__(Reach)
        reach.r = cudaapi.reach_threads(device)
        return reach

    @staticmethod
    def processes(int device):
        """Processes of one host, by CUDA IPC."""
        cdef Reach reach = Reach.__new__(Reach)
        reach.r = cudaapi.reach_processes(device)
        return reach

    @staticmethod
    def nccl(bytes library, geometry, int device, bytes unique_id):
        """Processes anywhere, by NCCL's windows. Collective; waits for every rank."""
        cdef Reach reach = Reach.__new__(Reach)
        cdef capi.Geometry g
        cdef string path = library, name = unique_id
        g.rank, g.size, g.ranks_per_node = geometry
        with nogil:
            reach.r = cudaapi.reach_nccl(path, g, device, name)
        return reach

    @property
    def rail(self):
        """What carries rows between nodes."""
        return (<bytes>self.r.get().rail()).decode()

    def retired(self):
        """Windows that have ended here and whose memory is kept until they have on every rank, by number."""
        return list(self.r.get().retired())

    def release(self, list numbers):
        """Give up windows that have ended on every rank. Every rank gives the same numbers."""
        cdef vector[int] v = numbers
        with nogil:
            self.r.get().release(v)

    def abort(self):
        with nogil:
            self.r.get().abort()


cdef class Buffer:
    cdef shared_ptr[cudaapi.DeviceBuffer] b
    cdef capi.Shape shape

    def __cinit__(self, geometry, Reach reach, int device, hidden, dtype, num_experts, top_k, max_tokens, channels, chunk_bytes, arena_bytes, bint check,
                  spread, int stages, double timeout):
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
        self.shape.channels = channels
        self.shape.chunk_rows = max(1, chunk_bytes // self.shape.combine_row_bytes())
        self.shape.arena_bytes = arena_bytes
        with nogil:
            self.b = make_shared[cudaapi.DeviceBuffer](g, self.shape, check, device, reach.r, s, timeout)

    cdef shared_ptr[cudaapi.DeviceBuffer] borrow(self, str op) except *:
        """The native buffer for the length of a call, during which this object may be closed."""
        if not self.b:
            raise InvalidArgument(f"{op}: the buffer is closed", op=op)
        return self.b

    def __dealloc__(self):
        with nogil:
            self.b.reset()

    def card(self):
        return <bytes>self.b.get().card()

    def connect(self, list cards):
        cdef vector[string] c = cards
        with nogil:
            self.b.get().connect(c)

    def connected(self):
        pass

    def release(self):
        cdef shared_ptr[cudaapi.DeviceBuffer] b = self.b
        self.b.reset()
        with nogil:
            b.reset()

    def dispatch(self, uintptr_t x, uintptr_t scales, uintptr_t ids, bint ids_are_int32, uintptr_t weights, int tokens,
                 bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes, Plan plan, int scale_kind,
                 bint scales_by_column, uintptr_t stream):
        """(Plan, Block of the rows, Block of the output) or a Failure. Enqueued on `stream`."""
        cdef cudaapi.DeviceDispatchCall call
        cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("dispatch")
        cdef cudaapi.DeviceBuffer* buffer = held.get()
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
        call.stream = <void*>stream
        if plan is None:
            plan = Plan.__new__(Plan)
            plan.p = buffer.new_plan()
        with nogil:
            s = buffer.dispatch(call, plan.p, out.b, output.b)
        if s.code != capi.Code.ok:
            return _failure(s)
        return plan, out, output

    def combine(self, uintptr_t rows, uintptr_t weights, uintptr_t y, uintptr_t bias, int64_t bias_stride, Plan plan, Block output,
                uintptr_t back, uintptr_t slots, int wire, uintptr_t stream):
        """None or a Failure. Enqueued on `stream`."""
        cdef cudaapi.DeviceCombineCall call
        cdef capi.Status s
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("combine")
        cdef cudaapi.DeviceBuffer* buffer = held.get()
        call.rows = <const char*>rows
        call.weights = <const float*>weights
        call.back = <const float*>back
        call.y = <char*>y
        call.slots = <float*>slots
        call.bias = <const float*>bias
        call.bias_stride = bias_stride
        call.wire = <capi.Wire>wire
        call.stream = <void*>stream
        with nogil:
            s = buffer.combine(call, plan.p, output.b)
        return _failure(s)

    def refuse(self, str verb, int why, uintptr_t stream):
        """As the cpu world's core.refuse, for "dispatch" and "combine". Waits for `stream`."""
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
        return _failure(s)

    def fault(self):
        """What kernels have reported so far, or None."""
        return _failure(self.borrow("fault").get().fault())

    def owns(self, Plan plan):
        return plan.p.get().owner == <const void*>self.b.get()

    def block_layout(self, Plan plan, uint64_t rows, uint64_t row_bytes, uint64_t scale_bytes, bint scales_by_column=False):
        """Offsets of rows, scales, weights, ids and source in the block of a dispatch of such rows."""
        cdef capi.CallShape call = plan.p.get().view.call
        call.row_bytes = row_bytes
        call.scale_bytes = scale_bytes
        call.scales_by_column = scales_by_column
        cdef capi.BlockLayout l = capi.block_layout(rows, call, self.shape.top_k)
        return l.rows, l.scales, l.weights, l.ids, l.source

    def window(self):
        """(address, bytes) of the memory that peers read."""
        return <uintptr_t>self.b.get().window().data(), self.b.get().window().bytes()

    def arena(self):
        """(bytes held, blocks held, bytes in all)"""
        if not self.b:   # closed from another thread while its call failed
            return 0, 0, 0
        return self.b.get().arena().held_bytes(), self.b.get().arena().held_blocks(), self.b.get().arena().capacity()

    def captured_bytes(self):
        """Of the arena: what calls in CUDA graphs use."""
        return self.b.get().captured_bytes()

    def release_captured(self):
        """No graph with calls of this buffer is replayed any more."""
        self.b.get().release_captured()

    def counters(self):
        """What moved since the last take_counters, in the order of capi.Counters: device memory that kernels add to."""
        return _counters(self, self.borrow("stats").get().counters())

    def take_counters(self):
        cdef capi.Counters c
        cdef shared_ptr[cudaapi.DeviceBuffer] held = self.borrow("stats")
        with nogil:
            c = held.get().take_counters()
        return c


include "cuda_decode.pxi"
include "cuda_quant.pxi"


def device_limits():
    """(bytes of shared memory that a block may have, multiprocessors) of the current device."""
    cdef int size = 0, sms = 0
    cdef int error = cudaapi.shared_bytes_limit(&size, &sms)
    if error:
        raise RuntimeError((<bytes>cudaapi.error_text(error)).decode())
    return size, sms


def shared_bytes(spread, int stages=3):
    """Bytes of shared memory of a block for (sms, warps, senders, stage bytes)."""
    cdef cudaapi.Spread s
    s.sms, s.warps, s.senders, s.stage_bytes = spread
    s.stages = stages
    return cudaapi.shared_bytes(s)


cdef class IpcSample:
    """Memory to try CUDA IPC with, before windows are made."""
    cdef shared_ptr[cudaapi.IpcSample] s

    def __cinit__(self, int device):
        self.s = cudaapi.ipc_sample(device)

    def handle(self):
        """For another process; empty where this GPU exports nothing."""
        return <bytes>self.s.get().handle()

    def opens(self, bytes handle):
        """Whether another process's memory can be mapped here."""
        return self.s.get().opens(handle)


def nccl_headers():
    """The version code of the NCCL headers in this build, 0: none."""
    return cudaapi.nccl_headers_()


def nccl_unique_id(bytes library):
    """A new world's name."""
    cdef string path = library, name
    with nogil:
        name = cudaapi.nccl_unique_id_(path)
    return <bytes>name
