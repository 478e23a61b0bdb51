# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The calls of a simulated world. moecomm.sim documents and validates."""
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t

from moecomm._native cimport capi
from moecomm._native cimport simapi as world


cdef class Program:
    """Calls that every rank makes one after the other. It keeps their tensors alive."""

    def __cinit__(self):
        self.kept = []

    def dispatch(self, int handle, list parts, bint by_rank, int alignment, int64_t capacity, uint64_t row_bytes,
                 uint64_t scale_bytes, int kind, bint scales_given, double before, keep=None):
        """Add a dispatch. parts: by rank (tokens, ids, weights, x, scales), addresses or 0; ids 0: reuse the plan."""
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
        """Add a choice of replicas to the last dispatch.

        parts: by rank (slots, counted, routing), addresses; slots 0: this rank makes no choice. alone: move no rows.
        """
        cdef world.SimCall* call = &self.calls.back()
        call.mode, call.activate = <capi.Mode>mode, activate
        if alone:
            call.verb = world.SimVerb.choose
        for rank, (slots, counted, routing) in enumerate(parts):
            call.parts[rank].slots = <int64_t*><uintptr_t>slots
            call.parts[rank].counted = <int32_t*><uintptr_t>counted
            call.parts[rank].routing = routing
        self.kept.append(keep)

    def combine(self, int handle, list parts, bint keep_rows, int flip, int wire, bint echo_weights, double before,
                keep=None):
        """Add a combine. parts: by rank (rows, weights, bias, bias stride, y), addresses or 0."""
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

    def decode_dispatch(self, list parts, uint64_t row_bytes, uint64_t scale_bytes, int kind, bint scales_given,
                        double before, keep=None):
        """Add a decode_dispatch. parts: by rank (tokens, ids, weights or 0, x, scales)."""
        self.dispatch(0, parts, False, 1, -1, row_bytes, scale_bytes, kind, scales_given, before, keep)
        self.calls.back().verb = world.SimVerb.decode_dispatch

    def decode_combine(self, list parts, bint earlier, int flip, int wire, double before, keep=None):
        """Add a decode_combine. parts: by rank (rows, weights, y). earlier: of the dispatch before the last one."""
        parts = [(rows, weights, 0, 0, y) for rows, weights, y in parts]
        self.combine(earlier, parts, False, flip, wire, False, before, keep)
        self.calls.back().verb = world.SimVerb.decode_combine

    def decode_hook(self, int size, bint after_combine, bint earlier=False):
        """Add the receive phase of the last decode_dispatch or decode_combine; earlier: of the one before."""
        cdef world.SimCall call
        call.handle = earlier
        call.verb = world.SimVerb.decode_sum if after_combine else world.SimVerb.decode_receive
        call.parts.resize(size)
        self.calls.push_back(call)

    def decode_mask(self, int size, list ranks):
        """These ranks are dead; the others mask them and go on."""
        cdef world.SimCall call
        call.verb = world.SimVerb.decode_mask
        call.parts.resize(size)
        self.calls.push_back(call)
        self.leave_out(ranks)

    def leave_out(self, list ranks):
        """These ranks do not make the call appended last."""
        for rank in ranks:
            self.calls.back().parts[<int>rank].absent = True

    def refuse(self, list ranks, bint strays):
        """Let these ranks refuse the last call; strays: let them make another call instead."""
        for rank in ranks:
            if strays:
                self.calls.back().parts[<int>rank].strays = True
            else:
                self.calls.back().parts[<int>rank].refused = capi.Why.arguments

    def __len__(self):
        return self.calls.size()
