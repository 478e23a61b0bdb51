# What a rank does in the place of a call that it refuses; part of core.

def refuse(Buffer buffer, str verb, int why):
    """Take this rank's part in a "dispatch", "choose" or "combine" that it refuses, so that its peers learn of it in that call. None, or
    the Failure with which not all of them could be told. why: by the numbers of capi.Why."""
    cdef capi.DispatchCall call
    cdef Block out = Block.__new__(Block), output = Block.__new__(Block)
    cdef Plan plan = Plan.__new__(Plan)
    cdef capi.Status s
    cdef bint combines = verb == "combine", chooses = verb == "choose"
    cdef shared_ptr[capi.Buffer] held = buffer.borrow(verb)
    call.refused = <capi.Why>why
    plan.p = held.get().new_plan()
    with nogil:
        if combines:
            s = held.get().refuse_combine(<capi.Why>why)
        elif chooses:
            s = held.get().choose(call)
        else:
            s = held.get().dispatch(call, plan.p.get()[0], out.b, output.b)
        held.reset()
    _left(buffer.comm)
    return None if s.code == capi.Code.ok or capi.keeps_step(s) else _failure(s)
