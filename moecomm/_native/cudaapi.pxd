# Declarations of the C++ runtime of the cuda world for Cython.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native cimport capi
from moecomm._native.domainrows cimport DomainShape, GroupCall, Rows

cdef extern from "runtime/cuda/kernels/launch.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass Spread:
        int32_t sms
        int32_t warps
        int32_t senders
        uint32_t stage_bytes
        int32_t stages

    int shared_bytes_limit(int* bytes, int* sms)
    uint32_t shared_bytes(const Spread&)
    const char* error_text(int error)

cdef extern from "runtime/cuda/window.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass PeerAccess:
        string rail()
        vector[int] retired()
        void release(const vector[int]&) except +
        void abort()

    shared_ptr[PeerAccess] thread_peer_access(int device)
    shared_ptr[PeerAccess] process_peer_access(int device)
    cdef cppclass IpcSample:
        string handle() except +
        bool opens(const string&) except +
    shared_ptr[IpcSample] ipc_sample(int device) except +

    cdef cppclass DeviceWindow:
        char* data()
        uint64_t bytes()

    cdef cppclass DeviceBlock:
        char* data()
        uint64_t offset()
        uint64_t bytes()

cdef extern from "runtime/cuda/calls.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass DeviceCalls:
        DeviceCalls(int device) except +
        void make_board(const capi.Geometry&, PeerAccess&) except +
        string contact() except +
        void connect(const vector[string]&) except +
        capi.Status fault() except +

cdef extern from "runtime/cuda/nccl.hpp" namespace "moecomm::cuda" nogil:
    int nccl_headers_ "moecomm::cuda::nccl_headers"()
    string nccl_unique_id_ "moecomm::cuda::nccl_unique_id"(const string& library) except +
    shared_ptr[PeerAccess] nccl_peer_access(const string& library, const capi.Geometry&, int device,
                                            const string& unique_id) except +

cdef extern from "runtime/plan.hpp" namespace "moecomm" nogil:
    cdef cppclass PlanView:
        int32_t tokens
        int64_t* tokens_per_expert
        int64_t* rows_per_expert
        capi.CallShape call

cdef extern from "runtime/cuda/buffer.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass DevicePlan:
        PlanView view
        int64_t num_rows
        const void* owner

    cdef cppclass DeviceDispatchCall(capi.DispatchCall):
        void* stream

    cdef cppclass DeviceCombineCall(capi.CombineCall):
        void* stream

    cdef cppclass DeviceBuffer:
        DeviceBuffer(capi.Geometry, capi.Shape, bool check, int device, shared_ptr[PeerAccess],
                     shared_ptr[DeviceCalls], Spread, double timeout) except +
        string contact() except +
        void connect(const vector[string]&) except +
        shared_ptr[DevicePlan] new_plan() except +
        capi.Status dispatch(const DeviceDispatchCall&, const shared_ptr[DevicePlan]&, shared_ptr[DeviceBlock]&,
                             shared_ptr[DeviceBlock]&) except +
        capi.Status combine(const DeviceCombineCall&, const shared_ptr[DevicePlan]&,
                            const shared_ptr[DeviceBlock]&) except +
        uint64_t captured_bytes()
        void release_captured()
        capi.Status refuse_combine(capi.Why, DevicePlan&, void* stream) except +
        capi.Status late_fault() except +
        capi.Status ended() except +
        capi.Counters take_counters() except +
        const capi.Counters* counters()
        const capi.Arena& arena()
        const DeviceWindow& window()

cdef extern from "schedule/decode_slices.hpp" namespace "moecomm" nogil:
    cdef cppclass DecodeView:
        uint64_t packed_rows()
        int experts_per_rank()
        capi.Geometry geometry
        capi.Shape shape

    uint64_t decode_scale_area(const capi.Geometry&, const capi.Shape&)

cdef extern from "runtime/cuda/decode.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass DeviceDecodeDispatch(capi.DecodeDispatchCall):
        void* stream

    cdef cppclass DeviceDecodeCombine(capi.DecodeCombineCall):
        void* stream

    cdef cppclass DeviceDecode:
        DeviceDecode(capi.Geometry, capi.Shape, bool check, int device, shared_ptr[PeerAccess],
                     shared_ptr[DeviceCalls], Spread, double timeout) except +
        string contact() except +
        void connect(const vector[string]&) except +
        capi.Status dispatch(const DeviceDecodeDispatch&) except +
        capi.Status dispatch_receive(uint64_t epoch, void* stream) except +
        capi.Status combine(const DeviceDecodeCombine&) except +
        capi.Status combine_receive(uint64_t epoch, void* stream) except +
        capi.Status refuse_combine(uint64_t epoch, capi.Why, void* stream) except +
        capi.Status late_fault() except +
        capi.Status ended() except +
        uint64_t rest() except +
        uint64_t calls() except +
        void mask(const vector[uint8_t]&, uint64_t latest, uint64_t calls) except +
        uint64_t epoch()
        capi.DecodeStage stage(uint64_t epoch, void* stream) except +
        char* x(int bank)
        char* scales(int bank)
        char* rows(int bank)
        char* counts(int bank)
        const DecodeView& view()
        const DeviceWindow& window()
        capi.Counters take_counters() except +
        const capi.Counters* counters()

cdef extern from "runtime/cuda/domain.hpp" namespace "moecomm::cuda" nogil:
    cdef cppclass DeviceDomain:
        DeviceDomain(capi.Geometry, DomainShape, int device, shared_ptr[PeerAccess], shared_ptr[DeviceCalls], Spread,
                     double timeout) except +
        string contact() except +
        void connect(const vector[string]&) except +
        capi.Status write(int rank, const vector[Rows]&, int counter, void* stream) except +
        capi.Status read(int rank, const vector[Rows]&, void* stream) except +
        capi.Status signal(int rank, int counter, uint64_t add, void* stream) except +
        capi.Status wait(int source, int counter, uint64_t at_least, void* stream) except +
        capi.Status fence(void* stream) except +
        capi.Status multicast(const vector[GroupCall]&, capi.Why, void* stream) except +
        capi.Status reduce(const vector[GroupCall]&, capi.Why, void* stream) except +
        uint64_t counter(int source, int counter) except +
        bool from_window_only()
        const shared_ptr[DeviceWindow]& window()
        uint64_t heap()
        capi.Counters take_counters(vector[uint64_t]&) except +

cdef extern from "runtime/cuda/kernels/quant_launch.hpp" namespace "moecomm" nogil:
    cdef enum class TileShape(int32_t):
        row

cdef extern from "runtime/cuda/kernels/quant_launch.hpp" namespace "moecomm::cuda" nogil:
    int launch_quantize(char* codes, float* scales, const char* x, int64_t rows, int64_t columns, capi.DType, TileShape,
                        capi.ScaleKind, void* stream)
    int launch_dequantize(char* x, const char* codes, const float* scales, int64_t rows, int64_t columns, capi.DType,
                          TileShape, void* stream)
    int launch_transpose_requantize(char* dst, float* dst_scales, const char* src, const float* src_scales,
                                    int64_t rows, int64_t columns, capi.ScaleKind, void* stream)
    int launch_encode_rows(char* coded, const char* x, int64_t rows, int64_t hidden, capi.DType, capi.Wire,
                           void* stream)
    int launch_decode_rows(char* x, const char* coded, int64_t rows, int64_t hidden, capi.DType, capi.Wire,
                           void* stream)
