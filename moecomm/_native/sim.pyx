# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The sim world, thinly: marshal, release the GIL, make one call. moecomm.sim documents and validates."""
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native cimport simapi as world

# By the numbers of capi.Code, capi.Phase, world.Did and Flaw.
_CODES = ("ok", "invalid", "timeout", "lost", "capacity", "mismatch", "corrupt", "interrupted", "refused", "out_of_step")
PHASES = ("none", "announce", "counts", "send", "forward", "arrive", "publish", "reduce", "sum", "done", "flush")
_DID = ("role", "wait", "put", "signal_rail", "signal_node", "landed", "give_up")
FLAWS = ("none", "signal_before_put", "skip_wait", "early_wait", "late_wait", "less_signalled", "more_signalled", "drop_put",
         "skip_rank", "skip_signal", "one_half", "other_half", "any_word", "hidden_refusal", "absent_refusal")


cdef class Program:
    """Calls that every rank runs one after the other. Keeps its tensors alive."""
    cdef vector[world.SimCall] calls
    cdef list kept

    def __cinit__(self):
        self.kept = []

    def dispatch(self, int handle, list parts, bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes, uint64_t scale_bytes,
                 int kind, bint scales_given, double before, keep=None):
        """parts: by rank (tokens, ids, weights, x, scales), addresses or 0; ids 0: the handle's plan is reused."""
        cdef world.SimCall call
        cdef world.SimPart part
        call.verb = world.SimVerb.dispatch
        call.handle = handle
        call.before = before
        call.shape.layout = capi.RowLayout.rank if by_rank else capi.RowLayout.expert
        call.shape.alignment = alignment
        call.shape.capacity = capacity
        call.shape.row_bytes = row_bytes
        call.shape.scale_bytes = scale_bytes
        call.shape.scales = <capi.ScaleKind>kind
        call.scales_given = scales_given
        for tokens, ids, weights, x, scales in parts:
            part.tokens = tokens
            part.ids = <const int64_t*><uintptr_t>ids
            part.weights = <const float*><uintptr_t>weights
            part.x = <const char*><uintptr_t>x
            part.scales = <const char*><uintptr_t>scales
            call.parts.push_back(part)
        self.calls.push_back(call)
        self.kept.append(keep)

    def choose(self, int mode, int activate, list parts, bint alone, keep=None):
        """The dispatch appended last chooses replicas. parts: by rank (slots, counted, routing), addresses; slots 0: this rank's does not. alone: it moves no rows."""
        cdef world.SimCall* call = &self.calls.back()
        call.mode, call.activate = <capi.Mode>mode, activate
        if alone:
            call.verb = world.SimVerb.choose
        for rank, (slots, counted, routing) in enumerate(parts):
            call.parts[rank].slots = <int64_t*><uintptr_t>slots
            call.parts[rank].counted = <int32_t*><uintptr_t>counted
            call.parts[rank].routing = routing
        self.kept.append(keep)

    def combine(self, int handle, list parts, bint keep_rows, int flip, int wire, bint echo_weights, double before, keep=None):
        """parts: by rank (rows, weights, bias, bias stride, y), addresses or 0."""
        cdef world.SimCall call
        cdef world.SimPart part
        call.verb = world.SimVerb.combine
        call.handle = handle
        call.keep = keep_rows
        call.flip = flip
        call.wire = <capi.Wire>wire
        call.echo_weights = echo_weights
        call.before = before
        for rows, weights, bias, stride, y in parts:
            part.rows = <const char*><uintptr_t>rows
            part.weights = <const float*><uintptr_t>weights
            part.bias = <const float*><uintptr_t>bias
            part.bias_stride = stride
            part.y = <char*><uintptr_t>y
            call.parts.push_back(part)
        self.calls.push_back(call)
        self.kept.append(keep)

    def decode_dispatch(self, list parts, uint64_t row_bytes, uint64_t scale_bytes, int kind, bint scales_given, double before, keep=None):
        """parts: by rank (tokens, ids, weights or 0, x, scales)."""
        self.dispatch(0, parts, False, 1, -1, row_bytes, scale_bytes, kind, scales_given, before, keep)
        self.calls.back().verb = world.SimVerb.decode_dispatch

    def decode_combine(self, list parts, bint earlier, int flip, int wire, double before, keep=None):
        """parts: by rank (rows, weights, y), addresses or 0. earlier: of the dispatch before the last one."""
        self.combine(earlier, [(rows, weights, 0, 0, y) for rows, weights, y in parts], False, flip, wire, False, before, keep)
        self.calls.back().verb = world.SimVerb.decode_combine

    def decode_hook(self, int size, bint after_combine, bint earlier=False):
        """A receive phase: of the last decode_dispatch, or of the last decode_combine; of the one before that."""
        cdef world.SimCall call
        call.handle = earlier
        call.verb = world.SimVerb.decode_sum if after_combine else world.SimVerb.decode_receive
        call.parts.resize(size)
        self.calls.push_back(call)

    def refuse(self, list ranks, bint strays):
        """In the call appended last these ranks refuse their parts; strays: they make another call instead."""
        for rank in ranks:
            if strays:
                self.calls.back().parts[<int>rank].strays = True
            else:
                self.calls.back().parts[<int>rank].refused = capi.Why.arguments

    def __len__(self):
        return self.calls.size()


cdef dict _line(const world.LogLine& l):
    return dict(begin=l.begin, end=l.end, did=_DID[<int>l.did], phase=PHASES[<int>l.phase], rank=l.rank, channel=l.channel, peer=l.peer,
                role=(<bytes>l.role).decode(), offset=l.offset, value=l.value)


cdef dict _waiting(const world.RoleState& r):
    return dict(role=(<bytes>r.name).decode(), rank=r.rank, channel=r.channel, phase=PHASES[<int>r.phase], peer=r.peer, at_least=r.at_least)


cdef class Cluster:
    cdef unique_ptr[world.SimCluster] c
    cdef world.SimConfig config

    def __cinit__(self, int size, int ranks_per_node, int num_sms, hidden, int dtype, num_experts, top_k, max_tokens, channels, arena_bytes,
                  bint payload, bint decode, int schedule, int workers, dict hardware, list placement, int logical_experts):
        cdef world.SimConfig* g = &self.config
        cdef world.Hardware* h = &g.hardware
        g.size, g.ranks_per_node, g.num_sms, g.payload = size, ranks_per_node, num_sms, payload
        g.shape.hidden = hidden
        g.shape.dtype = <capi.DType>dtype
        g.shape.num_experts = num_experts
        g.shape.top_k = top_k
        g.shape.max_tokens = max_tokens
        g.shape.channels = channels
        g.shape.arena_bytes = arena_bytes
        g.shape.logical_experts = logical_experts
        g.placement = placement
        g.decode, g.workers = decode, workers
        g.schedule = <world.SimSchedule>schedule
        h.node_rate, h.node_latency = hardware["node_rate"], hardware["node_latency"]
        h.rail_rate, h.rail_latency, h.rail_message = hardware["rail_rate"], hardware["rail_latency"], hardware["rail_message"]
        h.sm_read, h.sm_write = hardware["sm_read"], hardware["sm_write"]
        h.put, h.poll, h.launch, h.plan_token = hardware["put"], hardware["poll"], hardware["launch"], hardware["plan_token"]
        self.c.reset(new world.SimCluster(self.config))

    def reset(self, seed=None, double lead=0, uint64_t budget=<uint64_t>-1):
        """A clean start; with a seed the next run is perturbed by it."""
        self.c.get().reset(world.Chaos() if seed is None else world.Chaos(<uint64_t>seed, budget), lead)

    def run(self, Program program, uint64_t[:, :, ::1] times):
        """Fills times [calls, ranks, 2] with begin and end in ps. Returns the calls that failed: (call, rank, code, phase, peer, expected, got)."""
        cdef const world.SimResult* r
        cdef Py_ssize_t call, rank, size = self.config.size
        with nogil:
            self.c.get().run(program.calls)
        failed = []
        cdef const vector[world.SimResult]* all = &self.c.get().results()
        for call in range(times.shape[0]):
            for rank in range(size):
                r = &all.at(call * size + rank)
                times[call, rank, 0], times[call, rank, 1] = r.begin, r.end
                if r.ran and <int>r.status.code:
                    failed.append((call, rank, _CODES[<int>r.status.code], PHASES[<int>r.status.phase], r.status.peer, r.status.expected, r.status.got))
        return failed

    def plan(self, int rank, int handle):
        """(tokens per expert, rows per expert) of a dispatch at a rank."""
        cdef const world.Plan* p = self.c.get().plan(rank, handle)
        n = self.config.shape.num_experts // self.config.size
        return [p.view.tokens_per_expert[i] for i in range(n)], [p.view.rows_per_expert[i] for i in range(n)]

    def block(self, int rank, int handle):
        """(address, rows, offsets of rows, scales, weights, ids, source) of what a dispatch delivered."""
        cdef uint64_t rows = self.c.get().rows(rank, handle)
        cdef capi.BlockLayout l = capi.block_layout(rows, self.c.get().plan(rank, handle).view.call, self.config.shape.top_k)
        return <uintptr_t>self.c.get().block(rank, handle), rows, (l.rows, l.scales, l.weights, l.ids, l.source)

    def packed(self, int rank):
        """(address, rows, offset of x, offsets of scales by expert, offset of counts) of the last decode_dispatch at a rank."""
        cdef world.SimDecode* d = &self.c.get().decode(rank)
        cdef int parity = d.epoch() & 1
        return <uintptr_t>d.memory(), d.view().packed_rows(), d.view().x(parity), \
            [d.view().scales(parity, e) for e in range(self.config.shape.num_experts // self.config.size)], d.view().counts(parity).value

    def counters(self, int rank):
        """The protocol's own counters, as Buffer.stats()."""
        cdef capi.Counters c = self.c.get().net().rank(rank).counters
        return c

    def links(self, int rank):
        """What crossed the links of a rank, and how long they were busy (ps)."""
        cdef world.SimRank* r = &self.c.get().net().rank(rank)
        return dict(rail=r.rail_sent, node=r.node_moved, busy=dict(rail_out=r.rail_out.busy(), rail_in=r.rail_in.busy(),
                                                                   node_out=r.node_out.busy(), node_in=r.node_in.busy()))

    def set_log(self, bint on):
        self.c.get().net().set_log(on)

    def log(self):
        cdef const vector[world.LogLine]* lines = &self.c.get().net().log_lines()
        return [_line(lines.at(i)) for i in range(lines.size())]

    def stuck(self):
        """Roles that waited when nobody could go on."""
        cdef const vector[world.RoleState]* roles = &self.c.get().net().stuck_roles()
        return [_waiting(roles.at(i)) for i in range(roles.size())]

    @property
    def switches(self):
        return self.c.get().events()

    def explore(self, Program program, str flaw, str phase, bint chosen, uint64_t first_seed, uint64_t count):
        """What `count` schedules found, or None in `what`. chosen: the flaw shows only where replicas have been chosen, until the call is over."""
        cdef world.Mutation m
        cdef world.Finding f
        m.flaw = <world.Flaw><int>FLAWS.index(flaw)
        m.phase = <capi.Phase><int>PHASES.index(phase)
        m.chosen = chosen
        with nogil:
            f = world.explore(self.c.get()[0], program.calls, m, first_seed, count)
        return dict(found=f.found, schedules=f.schedules, seed=f.seed, perturbations=f.perturbations, call=f.call, rank=f.rank,
                    what=f.what.decode(), log=[_line(f.log[i]) for i in range(f.log.size())],
                    stuck=[_waiting(f.stuck[i]) for i in range(f.stuck.size())])
