# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language=c++
"""Signals during native calls, and checks at the begin of a call."""
import os
import threading

from cpython.exc cimport PyErr_Occurred, PyErr_SetString
from libcpp cimport bool
from posix.types cimport pid_t
from posix.unistd cimport getpid

from moecomm._native cimport capi

from moecomm.errors import InvalidArgument

# Python runs signal handlers on the main thread between two bytecode instructions. A main thread that waits in native
# code must call this function to run them.
cdef extern from "Python.h":
    int _run_signal_handlers "PyErr_CheckSignals"() noexcept

cdef extern from "<pthread.h>" nogil:
    unsigned long pthread_self()

cdef unsigned long _main_thread = threading.main_thread().ident


def _note_main_thread():
    global _main_thread
    _main_thread = threading.get_ident()


os.register_at_fork(after_in_child=_note_main_thread)   # the forking thread is the only one in the child


cdef bint _handle_signals() noexcept:
    cdef pid_t pid = getpid()
    if PyErr_Occurred() == NULL:   # a pending exception stays; Communicator.left() raises it
        _run_signal_handlers()
    if PyErr_Occurred() == NULL and getpid() != pid:
        PyErr_SetString(
            InvalidArgument,
            "a signal handler has forked during a call, and the child has returned into the call; expected os._exit in "
            "the child",
        )
    return PyErr_Occurred() != NULL


# Threads other than the main one never take the GIL here, because they could not do so at the end of the interpreter.
cdef bool _interrupted() noexcept nogil:
    if pthread_self() != _main_thread:
        return False
    with gil:
        return _handle_signals()

capi.interrupted = _interrupted


cdef int enter(capi.Communicator* comm, str op) except -1:
    """Refuse a call inside another call, where it would wait for itself, and a call in a forked child."""
    if comm == NULL:
        refuse_closed(op, "communicator")
    if not comm.calls().is_here():
        raise InvalidArgument(
            f"{op}: the communicator belongs to the parent process; expected one that this process has made, because a "
            "forked child cannot use it",
            op=op,
            rank=comm.geometry().rank,
        )
    cdef const char* running = comm.calls().running()
    if running != NULL:
        raise InvalidArgument(
            f"{op}: this thread is inside {(<bytes>running).decode()} of the same communicator, which waits while "
            f"this code runs (a signal handler, a finalizer); expected {op} after that call has returned",
            op=op,
            rank=comm.geometry().rank,
        )
    return 0


cdef int refuse_closed(str op, str what) except -1:
    raise InvalidArgument(f"{op}: the {what} is closed", op=op)
