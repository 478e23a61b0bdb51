# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""What other threads may wait for while a dispatch runs."""
from libcpp.memory cimport make_unique

from moecomm._native cimport capi
from moecomm._native.cpu_world.block cimport Block
from moecomm._native.cpu_world.plan cimport Plan


cdef class FirstPhase:
    """The first phase of one dispatch. Any thread may wait for it.

    make: what makes a result of (Plan, Block of the rows, Block of the output); set before every native call.
    """

    def __cinit__(self):
        self.f = make_unique[capi.FirstPhase]()

    cdef capi.FirstPhase* begin(self, Plan plan, Block out, Block output):
        """For the call: what it fills. A call that is repeated begins again."""
        self.f.get().begin()
        self.parts = self.make, plan, out, output
        return self.f.get()

    def end(self):
        """The call has ended."""
        with nogil:
            self.f.get().end()

    def wait(self, int milliseconds):
        """(make, Plan, Block of the rows, Block of the output), whose rows are in flight.

        True where the call has ended without; False after this time.
        """
        cdef capi.FirstPhaseState state
        cdef tuple parts = self.parts
        with nogil:
            state = self.f.get().wait_for(milliseconds)
        if state == capi.FirstPhaseState.over:
            return True
        # Otherwise another attempt has begun meanwhile, whose places may not be known.
        return parts if state == capi.FirstPhaseState.placed and parts is self.parts else False
