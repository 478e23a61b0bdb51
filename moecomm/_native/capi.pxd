# Declarations of the C++ runtime for Cython.
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

cdef extern from "base/shape.hpp" namespace "moecomm" nogil:
    cdef cppclass Geometry:
        int rank
        int size
        int ranks_per_node

    cdef enum class DType(int32_t):
        bf16
        f16
        f32
        f64

    cdef enum class RowLayout(int32_t):
        expert
        rank

    cdef enum class Code(int32_t):
        ok
        invalid
        timeout
        lost
        capacity
        mismatch
        corrupt
        interrupted
        refused
        out_of_step

    cdef enum class Why(int32_t):
        none
        arguments
        picks
        error

    cdef enum class Phase(int32_t):
        none
        announce
        counts
        send
        forward
        arrive
        publish
        reduce
        sum
        done
        flush

    cdef cppclass Status:
        Code code
        Phase phase
        int32_t peer
        int32_t detail
        uint64_t expected
        uint64_t got
        int32_t reporter

    bool is_final(const Status&)
    bool keeps_step(const Status&)

    cdef cppclass Shape:
        int64_t hidden
        DType dtype
        int32_t num_experts
        int32_t top_k
        int32_t max_tokens
        int32_t channels
        int32_t chunk_rows
        uint64_t arena_bytes
        int32_t logical_experts
        uint64_t combine_row_bytes()
        uint64_t scale_bytes()

    cdef enum class ScaleKind(int32_t):
        none
        f32
        ue8m0

    cdef enum class Wire(int32_t):
        plain
        fp8
        logfmt10

    cdef cppclass CallShape:
        RowLayout layout
        int32_t alignment
        int64_t capacity
        uint64_t row_bytes
        uint64_t scale_bytes
        ScaleKind scales
        bool scales_by_column
        uint32_t routing

cdef extern from "base/counters.hpp" namespace "moecomm" nogil:
    cdef struct HopCounters:
        uint64_t logical_rows
        uint64_t physical_rows
        uint64_t logical_bytes
        uint64_t physical_bytes

    cdef struct Counters:
        HopCounters rail
        HopCounters node
        uint64_t replicated_rows
        uint64_t quantized_rows
        uint64_t staged_rows
        uint64_t calls
        uint64_t exchanges

cdef extern from "base/layout.hpp" namespace "moecomm" nogil:
    cdef cppclass BlockLayout:
        uint64_t rows "rows.value"
        uint64_t scales "scales.value"
        uint64_t weights "weights.value"
        uint64_t ids "ids.value"
        uint64_t source "source.value"
        uint64_t bytes

    cdef cppclass OutputLayout:
        uint64_t rows "rows.value"
        uint64_t weights "weights.value"
        uint64_t bytes

    BlockLayout block_layout(uint64_t rows, const CallShape& call, int top_k)
    OutputLayout output_layout(uint64_t rows, const Shape& shape)

cdef extern from "fabric/cpu/host_state.hpp" namespace "moecomm" nogil:
    bool (*interrupted)() noexcept

cdef extern from "balance/replica_policy.hpp" namespace "moecomm::balance" nogil:
    cdef enum class Mode(int32_t):
        local
        even
        optimal

    cdef cppclass ReplicaPolicy:
        ReplicaPolicy(const int32_t* physical_to_logical, int slots, int experts, int ranks, int nodes, Mode mode,
                      int activate) except +
        bool needs_all()

cdef extern from "fabric/cpu/waits.hpp" namespace "moecomm" nogil:
    cdef cppclass WaitEntry "moecomm::Waits::Entry":
        uint64_t count, nanoseconds
        int64_t progress

    cdef cppclass Waits:
        int ranks()
        const WaitEntry& of(int rank)
        int waiting_for()
        int64_t since()
        Phase phase()

cdef extern from "runtime/cpu/communicator.hpp" namespace "moecomm" nogil:
    cdef enum class RailKind(int):
        none
        loopback
        ucx

    cdef cppclass CallLock:
        bool is_here()
        const char* running()
        void wait()

    cdef cppclass Communicator:
        Geometry geometry()
        CallLock& calls()
        Communicator(Geometry, bool threads, RailKind rail, double timeout, bool patient,
                     Communicator* previous) except +
        void prepare_next() except +
        string contact() except +
        void connect(const vector[string]&) except +
        void abort(int rank)
        uint64_t calls_begun()
        const Waits& waits()
        Status broken()
        void mark_broken(const Status&)
        void leave_calls(int peer)
        int ended(int milliseconds) except +
        bool has_ended(int rank, int milliseconds) except +

cdef extern from "runtime/memory.hpp" namespace "moecomm" nogil:
    cdef cppclass Memory:
        char* data()
        uint64_t bytes()

    cdef cppclass Block:
        char* data()
        uint64_t offset()
        uint64_t bytes()

    cdef cppclass Arena:
        uint64_t held_bytes()
        int held_blocks()
        uint64_t capacity()

cdef extern from "runtime/plan.hpp" namespace "moecomm" nogil:
    cdef struct Pick:
        uint16_t expert
        uint16_t k

    cdef cppclass PlanView:
        int32_t tokens
        uint8_t* picks
        Pick* pick
        int64_t* tokens_per_expert
        int64_t* rows_per_expert
        int64_t* rank_rows
        CallShape call

    cdef cppclass Plan:
        PlanView view
        const void* owner

cdef extern from "base/roles.hpp" namespace "moecomm" nogil:
    cdef enum class RoleKind(int32_t):
        pass

cdef extern from "fabric/cpu/host.hpp" namespace "moecomm" nogil:
    cdef struct RoleSpan:
        RoleKind role
        int64_t begin
        int64_t end

cdef extern from "fabric/cpu/fault.hpp" namespace "moecomm" nogil:
    cdef enum class FaultPoint "moecomm::Fault::Point"(int32_t):
        pass

    cdef enum class FaultAction "moecomm::Fault::Action"(int32_t):
        pass

    cdef cppclass Fault:
        FaultPoint point
        FaultAction action
        Phase phase
        int64_t passes

cdef extern from "runtime/cpu/recording.hpp" namespace "moecomm" nogil:
    cdef struct RecordedCall:
        pass

    cdef cppclass RecordingSegment "moecomm::Recording::Segment":
        vector[RecordedCall] calls
        vector[int16_t] ids16
        vector[int32_t] ids32
        vector[float] weights
        vector[RoleSpan] spans

    cdef cppclass Recording:
        Recording(int top_k, int num_experts)
        uint64_t bytes()

cdef extern from "runtime/cpu/first_phase.hpp" namespace "moecomm" nogil:
    cdef enum class FirstPhaseState "moecomm::FirstPhase::State"(int):
        running
        placed
        over

    cdef cppclass FirstPhase:
        void begin() except +
        void end() except +
        FirstPhaseState wait_for(int milliseconds) except +

cdef extern from "runtime/cpu/buffer.hpp" namespace "moecomm" nogil:
    cdef cppclass DispatchCall:
        const char* x
        const char* scales
        const int64_t* ids64
        const int32_t* ids32
        const float* weights
        int32_t tokens
        Why refused
        bool cached
        CallShape shape
        const ReplicaPolicy* policy
        int64_t* slots
        int32_t* counted

    cdef cppclass CombineCall:
        const char* rows
        const float* weights
        const float* back
        char* y
        float* returned
        bool sums_back
        const float* bias
        int64_t bias_stride
        Wire wire

    cdef cppclass Buffer:
        Communicator& comm()
        string contact() except +
        void connect(const vector[string]&) except +
        void finish_connect()
        shared_ptr[Plan] new_plan() except +
        int64_t local_rows(const Plan&)
        Status dispatch(const DispatchCall&, Plan&, shared_ptr[Block]&, shared_ptr[Block]&) except +
        Status dispatch(const DispatchCall&, Plan&, shared_ptr[Block]&, shared_ptr[Block]&, FirstPhase*) except +
        Status combine(const CombineCall&, Plan&, const Block&) except +
        Status choose(const DispatchCall&) except +
        Status refuse_combine(Why) except +
        const Arena& arena()
        const Memory& window()
        Counters counters()
        Counters take_counters()
        void trace(bool)
        vector[RoleSpan] take_timeline() except +
        void record(shared_ptr[Recording])
        RecordingSegment take(Recording&) except +
        void set_stream_threshold(uint64_t)
        bool rail_is_mapped()
        void set_fault(Fault)
        @staticmethod
        uint64_t bytes(const Geometry&, const Shape&)

    shared_ptr[Buffer] make_buffer "moecomm::make_owned<moecomm::Buffer>"(
        shared_ptr[Communicator], Shape, bool check) except +

cdef extern from "protocol/decode_stage.hpp" namespace "moecomm" nogil:
    cdef enum class DecodeStage(int32_t):
        idle
        sent
        received
        answered
        done

cdef extern from "runtime/cpu/decode.hpp" namespace "moecomm" nogil:
    cdef cppclass DecodeDispatchCall:
        const char* x
        const char* scales
        const int64_t* ids64
        const int32_t* ids32
        const float* weights
        bool weighted
        int32_t tokens
        Why refused
        ScaleKind quant
        bool scales_by_column
        bool receive

    cdef cppclass DecodeCombineCall:
        uint64_t epoch
        const char* rows
        const int64_t* ids64
        const int32_t* ids32
        const float* weights
        Wire wire
        char* y
        bool receive

    cdef cppclass Decode:
        Communicator& comm()
        string contact() except +
        void connect(const vector[string]&) except +
        void finish_connect()
        Status dispatch(const DecodeDispatchCall&, uint64_t& epoch)
        Status dispatch_receive(uint64_t epoch)
        Status combine(const DecodeCombineCall&)
        Status combine_receive(uint64_t epoch)
        Status refuse_combine(uint64_t epoch, Why)
        uint64_t rest() except +
        void mask(const vector[uint8_t]&, uint64_t latest, uint64_t calls) except +
        uint64_t epoch()
        DecodeStage stage(uint64_t epoch)
        void trace(bool)
        vector[RoleSpan] take_timeline() except +
        void record(shared_ptr[Recording])
        bool weighted(uint64_t epoch)
        const Memory& window()
        char* x(int parity)
        char* scales(int parity)
        char* rows(int parity)
        int64_t* counts(int parity)
        int64_t packed_rows()
        int64_t scale_area()
        int num_local_experts()
        Counters counters()
        Counters take_counters()
        void set_stream_threshold(uint64_t)
        void set_fault(Fault)
        @staticmethod
        uint64_t bytes(const Geometry&, const Shape&)

    shared_ptr[Decode] make_decode "moecomm::make_owned<moecomm::Decode>"(
        shared_ptr[Communicator], Shape, bool check) except +

cdef extern from "runtime/cpu/decode_floor.hpp" namespace "moecomm" nogil:
    cdef cppclass DecodeFloor:
        DecodeFloor(Decode&, const char* x, char* y) except +
        Status run(int steps)
        Status latency(int rounds)

cdef extern from "fabric/cpu/rows.hpp" namespace "moecomm" nogil:
    cdef cppclass RowKernels:
        const char* name

    const RowKernels& row_kernels()

cdef extern from "fabric/cpu/rows_choice.hpp" namespace "moecomm" nogil:
    cdef cppclass RowKernelTime:
        string name
        double few, many

    cdef cppclass RowKernelChoice:
        string build, few, many, reason, cpu
        vector[RowKernelTime] times

    const RowKernelChoice& row_kernel_choice() except +
    vector[const RowKernels*] row_kernel_variants() except +
    vector[RowKernelTime] time_row_kernels(const vector[const RowKernels*]&, double) except +

cdef extern from "fabric/cpu/ucx.hpp" namespace "moecomm" nogil:
    cdef cppclass UcxContext:
        @staticmethod
        string version()

cdef extern from "fabric/cpu/ucx_library.hpp" namespace "moecomm":
    void set_ucx_folders(vector[string])
    void require_ucx() except +

cdef extern from "runtime/cpu/tools.hpp" namespace "moecomm" nogil:
    void gather_rows(char* dst, const char* src, const int64_t* index, int64_t rows, uint64_t row_bytes, bool stream)
    void sum_rows(char* dst, const char* src, const int64_t* index, const float* weights, int64_t tokens, int terms,
                  int64_t hidden, DType dtype)
    int64_t count_different(const char* got, const char* want, const int64_t* index, int64_t rows,
                            int64_t row_elements, int64_t element_bytes)

    cdef cppclass RateProbe:
        RateProbe(int64_t bytes) except +
        int64_t bytes()
        void write()
        uint64_t read()
