# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""A simulated world. moecomm.sim documents and validates."""
from libc.stdint cimport uint64_t, uintptr_t
from libcpp.memory cimport unique_ptr
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native cimport simapi as world
from moecomm._native.shared.status cimport name_of_code, name_of_phase
from moecomm._native.shared.structures cimport shape_of
from moecomm._native.sim_world.log cimport fill_hardware, line_of, mutation_of, waiting_of
from moecomm._native.sim_world.program cimport Program


cdef class Cluster:
    cdef unique_ptr[world.SimCluster] c
    cdef world.SimConfig config

    def __cinit__(self, int size, int ranks_per_node, int num_sms, hidden, int dtype, num_experts, top_k, max_tokens,
                  channels, arena_bytes, bint payload, bint decode, int schedule, int workers, dict hardware,
                  list placement, int logical_experts):
        cdef world.SimConfig* g = &self.config
        fill_hardware(&g.hardware, hardware)
        g.size, g.ranks_per_node, g.num_sms, g.payload = size, ranks_per_node, num_sms, payload
        g.shape = shape_of(hidden, dtype, num_experts, top_k, max_tokens, channels, arena_bytes, logical_experts)
        g.placement = placement
        g.decode, g.workers = decode, workers
        g.schedule = <world.SimSchedule>schedule
        self.c.reset(new world.SimCluster(self.config))

    def reset(self, seed=None, double lead=0, uint64_t budget=<uint64_t>-1):
        """Reset all state. A seed perturbs the schedule of the next run."""
        self.c.get().reset(world.Chaos() if seed is None else world.Chaos(<uint64_t>seed, budget), lead)

    def run(self, Program program, uint64_t[:, :, ::1] times):
        """Run a program. Write begin and end of each call in ps to times [calls, ranks, 2].

        Return the failed calls: [(call, rank, code, phase, peer, expected, got)].
        """
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
                    failed.append((call, rank, name_of_code(r.status.code), name_of_phase(r.status.phase),
                                   r.status.peer, r.status.expected, r.status.got))
        return failed

    def plan(self, int rank, int handle):
        """Return (tokens per expert, rows per expert) of a dispatch on a rank."""
        cdef const world.Plan* p = self.c.get().plan(rank, handle)
        n = self.config.shape.num_experts // self.config.size
        return [p.view.tokens_per_expert[i] for i in range(n)], [p.view.rows_per_expert[i] for i in range(n)]

    def block(self, int rank, int handle):
        """Return (address, rows, offsets of rows, scales, weights, ids, source) of the result of a dispatch."""
        cdef uint64_t rows = self.c.get().rows(rank, handle)
        cdef capi.CallShape call = self.c.get().plan(rank, handle).view.call
        cdef capi.BlockLayout l = capi.block_layout(rows, call, self.config.shape.top_k)
        return <uintptr_t>self.c.get().block(rank, handle), rows, (l.rows, l.scales, l.weights, l.ids, l.source)

    def packed(self, int rank):
        """Return the result of the last decode_dispatch on a rank.

        It is (address, rows, offset of x, offsets of scales by expert, offset of counts).
        """
        cdef world.SimDecode* d = &self.c.get().decode(rank)
        cdef int parity = d.epoch() & 1
        scales = [d.view().scales(parity, e) for e in range(self.config.shape.num_experts // self.config.size)]
        x, counts = d.view().x(parity), d.view().counts(parity).value
        return <uintptr_t>d.memory(), d.view().packed_rows(), x, scales, counts

    def counters(self, int rank):
        """Return the counters of the protocol, as Buffer.stats."""
        cdef capi.Counters c = self.c.get().net().rank(rank).counters
        return c

    def links(self, int rank):
        """Return the traffic on the links of a rank, and the times in ps for which they were busy."""
        cdef world.SimRank* r = &self.c.get().net().rank(rank)
        busy = {
            "rail_out": r.rail_out.busy(),
            "rail_in": r.rail_in.busy(),
            "node_out": r.node_out.busy(),
            "node_in": r.node_in.busy(),
        }
        return {"rail": r.rail_sent, "node": r.node_moved, "busy": busy}

    def set_log(self, bint on):
        self.c.get().net().set_log(on)

    def log(self):
        cdef const vector[world.LogLine]* lines = &self.c.get().net().log_lines()
        return [line_of(lines.at(i)) for i in range(lines.size())]

    def stuck(self):
        """Return the roles that waited when no role could go on."""
        cdef const vector[world.RoleState]* roles = &self.c.get().net().stuck_roles()
        return [waiting_of(roles.at(i)) for i in range(roles.size())]

    @property
    def switches(self):
        return self.c.get().events()

    def explore(self, Program program, str mutant, str phase, bint chosen, uint64_t first_seed, uint64_t count):
        """Explore `count` schedules. Return the finding.

        chosen: the mutant acts only in calls in which replicas were chosen.
        """
        cdef world.Mutation m = mutation_of(mutant, phase, chosen)
        cdef world.Finding f
        with nogil:
            f = world.explore(self.c.get()[0], program.calls, m, first_seed, count)
        return {
            "found": f.found,
            "schedules": f.schedules,
            "seed": f.seed,
            "perturbations": f.perturbations,
            "call": f.call,
            "rank": f.rank,
            "what": f.what.decode(),
            "log": [line_of(f.log[i]) for i in range(f.log.size())],
            "stuck": [waiting_of(f.stuck[i]) for i in range(f.stuck.size())],
        }
