# What surrounds a native call: signals while it waits, calls from within it, objects that are released meanwhile; part of core.
import os

from cpython.exc cimport PyErr_Fetch, PyErr_Occurred, PyErr_Restore, PyErr_SetString

from posix.types cimport pid_t
from posix.unistd cimport getpid

from moecomm.errors import InvalidArgument

# Python runs its signal handlers on the main thread, between two of its instructions: a main thread that waits here asks for them.
cdef extern from "Python.h":
    int _run_signal_handlers "PyErr_CheckSignals"() noexcept

cdef extern from "<pthread.h>" nogil:
    unsigned long pthread_self()

cdef unsigned long _main_thread = threading.main_thread().ident


def _note_main_thread():
    global _main_thread
    _main_thread = threading.get_ident()


os.register_at_fork(after_in_child=_note_main_thread)   # the thread that forked is the only one there


cdef bint _handle_signals() noexcept:
    cdef pid_t pid = getpid()
    if PyErr_Occurred() == NULL:   # what is set stays set: _left raises it
        _run_signal_handlers()
    if PyErr_Occurred() == NULL and getpid() != pid:
        PyErr_SetString(InvalidArgument, "a signal handler forked in the middle of a call, and the child came back into it; expected os._exit in the child")
    return PyErr_Occurred() != NULL


# Holds no Python object: a thread that is not the main one never asks for the GIL here, not even while the interpreter ends.
cdef bool _interrupted() noexcept nogil:
    if pthread_self() != _main_thread:
        return False
    with gil:
        return _handle_signals()

capi.interrupted = _interrupted


cdef int _enter(capi.Communicator* comm, str op) except -1:
    """Refuse a call that would wait for itself, or for threads of another process."""
    if comm == NULL:
        _refuse_closed(op, "communicator")
    if not comm.calls().is_here():
        raise InvalidArgument(f"{op}: the communicator is the parent process's; a forked child cannot use it, expected one that the child makes", op=op,
                              rank=comm.geometry().rank)
    cdef const char* running = comm.calls().running()
    if running != NULL:
        raise InvalidArgument(f"{op}: this thread is inside {(<bytes>running).decode()} of the same communicator, which waits while this code runs (a signal "
                              f"handler, a finalizer); expected {op} after that call has returned", op=op, rank=comm.geometry().rank)
    return 0


cdef int _refuse_closed(str op, str what) except -1:
    raise InvalidArgument(f"{op}: the {what} is closed", op=op)


cdef int _left(Communicator comm) except -1:
    """After a native call: do what code inside it has put off, and raise what a signal handler raised."""
    cdef PyObject* kind
    cdef PyObject* value
    cdef PyObject* trace
    if comm.put_off is not None:
        PyErr_Fetch(&kind, &value, &trace)
        try:
            comm.do_put_off()
        finally:
            if kind != NULL:
                PyErr_Restore(kind, value, trace)
    return -1 if PyErr_Occurred() != NULL else 0
