# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""The native communicator of the cpu world: the ranks, and whether it is broken."""
import contextlib

from cpython.exc cimport PyErr_Fetch, PyErr_Occurred, PyErr_Restore
from cpython.ref cimport PyObject
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native.shared.status cimport Failure, failure_of, name_of_phase, status_of
from moecomm._native.shared.structures cimport geometry_of


cdef class Communicator:
    def __cinit__(self, int rank, int size, int ranks_per_node, bint threads, str rail, double timeout,
                  bint patient=False, Communicator previous=None):
        cdef capi.RailKind kind = capi.RailKind.none
        if rail == "loopback":
            kind = capi.RailKind.loopback
        elif rail == "ucx":
            kind = capi.RailKind.ucx
        cdef capi.Geometry geometry = geometry_of(rank, size, ranks_per_node)
        cdef shared_ptr[capi.Communicator] before
        if previous is not None:
            before = previous.c
        with nogil:   # other threads may run meanwhile
            self.c = shared_ptr[capi.Communicator](
                new capi.Communicator(geometry, threads, kind, timeout, patient, before.get()))

    def contact(self):
        return <bytes>self.c.get().contact()

    def connect(self, list contacts):
        cdef vector[string] c = contacts
        with nogil:
            self.c.get().connect(c)

    def abort(self, int rank):
        if self.c:   # another thread may have closed it
            self.c.get().abort(rank)

    def calls_begun(self):
        """Return the number of collective calls that this rank has begun. All ranks count in the same way."""
        return self.c.get().calls_begun() if self.c else 0

    def waits(self):
        """Return the waits of this rank: ([(waits, seconds, time of the last arrival or 0)] by rank, present wait).

        The present wait is (rank, begin, phase) or None. Times are those of time.monotonic(). Callable from any thread.
        """
        cdef shared_ptr[capi.Communicator] held = self.c
        if not held:
            return [], None
        cdef const capi.Waits* w = &held.get().waits()
        found = []
        for r in range(w.ranks()):
            found.append((w.of(r).count, w.of(r).nanoseconds * 1e-9, w.of(r).progress * 1e-9))
        now = None if w.waiting_for() < 0 else (w.waiting_for(), w.since() * 1e-9, name_of_phase(w.phase()))
        return found, now

    def broken(self):
        cdef capi.Status s
        if self.c:
            s = self.c.get().broken()
        return failure_of(s)

    def prepare_next(self):
        """Make objects that the next generation will need. Callable from any thread."""
        cdef shared_ptr[capi.Communicator] held = self.c
        with nogil:
            if held:
                held.get().prepare_next()
            held.reset()

    def leave_calls(self, int peer):
        """End the waits of other ranks for this one: it makes no more calls, because a peer is lost."""
        if self.c:
            with nogil:
                self.c.get().leave_calls(peer)

    def ended(self, int milliseconds):
        """Return a rank of this host whose process has ended, or ends within this time, or None."""
        cdef int rank
        with nogil:
            rank = self.c.get().ended(milliseconds)
        return None if rank < 0 else rank

    def has_ended(self, int rank, int milliseconds):
        """Whether a rank is a process of this host that has ended, or ends meanwhile."""
        cdef bint found
        with nogil:
            found = self.c.get().has_ended(rank, milliseconds)
        return found

    def lose(self, int peer):
        """A rank is lost: that ends this communicator, if nothing has before."""
        cdef capi.Status s
        s.code, s.peer = capi.Code.lost, peer
        if self.c:
            self.c.get().mark_broken(s)

    def note(self, Failure failure not None):
        """Note a Failure of the cuda world. A final one breaks this communicator."""
        cdef capi.Status s = status_of(failure)
        if self.c and capi.is_final(s):
            self.c.get().mark_broken(s)

    def running(self):
        """Return the name of the call that this thread is inside, or None. Signal handlers can run inside a call."""
        cdef const char* name = self.c.get().calls().running() if self.c else NULL
        return None if name == NULL else (<bytes>name).decode()

    def after_call(self, work):
        """Run work when the call that this thread is inside returns. Return False if it is inside no call."""
        if self.running() is None:
            return False
        self.put_off = [*(self.put_off or ()), work]
        return True

    cdef int left(self) except -1:
        """After a native call: run the work that after_call has queued, and raise the exception of a signal handler."""
        cdef PyObject* kind
        cdef PyObject* value
        cdef PyObject* trace
        if self.put_off is not None:
            PyErr_Fetch(&kind, &value, &trace)
            try:
                self.do_put_off()
            finally:
                if kind != NULL:
                    PyErr_Restore(kind, value, trace)
        return -1 if PyErr_Occurred() != NULL else 0

    cdef object do_put_off(self):
        works, self.put_off = self.put_off, None
        with contextlib.ExitStack() as all_of_them:   # run all of them, even if one raises
            for work in reversed(works):
                all_of_them.callback(work)

    def release(self):
        cdef shared_ptr[capi.Communicator] c = self.c
        self.c.reset()
        with nogil:
            if c:
                c.get().calls().wait()
            c.reset()
        self.left()

    def __dealloc__(self):
        with nogil:
            self.c.reset()
