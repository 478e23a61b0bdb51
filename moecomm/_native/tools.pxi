# The library's own packing and reduction, for baselines that swap only the transport.
def gather_rows(uintptr_t dst, uintptr_t src, uintptr_t index, int64_t rows, uint64_t row_bytes, bint stream):
    with nogil:
        capi.gather_rows(<char*>dst, <const char*>src, <const int64_t*>index, rows, row_bytes, stream)


def sum_rows(uintptr_t dst, uintptr_t src, uintptr_t index, uintptr_t weights, int64_t tokens, int terms, int64_t hidden, int dtype):
    with nogil:
        capi.sum_rows(<char*>dst, <const char*>src, <const int64_t*>index, <const float*>weights, tokens, terms, hidden,
                      <capi.DType>dtype)


def count_different(uintptr_t got, uintptr_t want, uintptr_t index, int64_t rows, int64_t row_elements, int64_t element_bytes):
    cdef int64_t n
    with nogil:
        n = capi.count_different(<const char*>got, <const char*>want, <const int64_t*>index, rows, row_elements, element_bytes)
    return n


cdef class RateProbe:
    """Passes over memory like a window's: write() streams stores, read() loads every byte."""
    cdef unique_ptr[capi.RateProbe] p

    def __cinit__(self, int64_t size):
        self.p.reset(new capi.RateProbe(size))

    @property
    def nbytes(self):
        return self.p.get().bytes()

    def write(self):
        with nogil:
            self.p.get().write()

    def read(self):
        cdef uint64_t r
        with nogil:
            r = self.p.get().read()
        return r


def set_ucx_folders(list folders):
    """Name the folders in which UCX is looked for before the system's libraries."""
    cdef vector[string] paths = [folder.encode() for folder in folders]
    capi.set_ucx_folders(paths)


def ucx_version():
    """The version of the UCX that this process uses. Raises RuntimeError where there is none."""
    capi.require_ucx()
    return (<bytes>capi.UcxContext.version()).decode()



cdef _times(const vector[capi.RowKernelTime]& times):
    return [(times[i].name.decode(), times[i].few, times[i].many) for i in range(times.size())]


def row_kernel_choice():
    """What this process uses and why: (build, variant for few terms, for many, reason, CPU, times as of time_row_kernels)."""
    cdef const capi.RowKernelChoice* c = &capi.row_kernel_choice()
    return c.build.decode(), c.few.decode(), c.many.decode(), c.reason.decode(), c.cpu.decode(), _times(c.times)


def time_row_kernels(double seconds):
    """[(variant, nanoseconds per row in sums of few terms, of many)] of every variant that this machine can run."""
    cdef vector[capi.RowKernelTime] times
    with nogil:
        times = capi.time_row_kernels(capi.row_kernel_variants(), seconds)
    return _times(times)
