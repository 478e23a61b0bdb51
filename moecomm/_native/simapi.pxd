# Declarations of the C++ simulator for Cython.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.vector cimport vector

from moecomm._native.capi cimport CallShape, Counters, Mode, Phase, PlanView, Shape, Status, Why, Wire

cdef extern from "fabric/sim/links.hpp" namespace "moecomm" nogil:
    cdef cppclass Hardware:
        double node_rate
        double node_latency
        double rail_rate
        double rail_latency
        double rail_message
        double sm_read
        double sm_write
        double put
        double poll
        double launch
        double plan_token

    cdef cppclass Calendar:
        uint64_t busy()

cdef extern from "fabric/sim/chaos.hpp" namespace "moecomm" nogil:
    cdef cppclass Chaos:
        Chaos()
        Chaos(uint64_t seed, uint64_t budget)

cdef extern from "fabric/sim/net.hpp" namespace "moecomm" nogil:
    cdef struct LinkCount:
        uint64_t row_bytes
        uint64_t rows
        uint64_t other_bytes
        uint64_t messages

    cdef cppclass SimRank:
        Counters counters
        Calendar node_out
        Calendar rail_out
        Calendar node_in
        Calendar rail_in
        LinkCount rail_sent
        LinkCount node_moved

    cdef enum class LogKind(int32_t):
        role
        wait
        put
        signal_rail
        signal_node
        landed
        give_up

    cdef struct LogLine:
        uint64_t begin
        uint64_t end
        LogKind kind
        Phase phase
        int32_t rank
        int32_t channel
        int32_t peer
        const char* role
        uint64_t offset
        uint64_t value

    cdef cppclass RoleState:
        const char* name
        int rank
        int channel
        uint64_t at_least
        Phase phase
        int peer

    cdef cppclass SimNet:
        SimRank& rank(int r)
        void set_log(bool on)
        const vector[LogLine]& log_lines()
        const vector[RoleState]& stuck_roles()

cdef extern from "fabric/sim/mutant.hpp" namespace "moecomm" nogil:
    cdef enum class Mutant(int32_t):
        none

    cdef cppclass Mutation:
        Mutant mutant
        Phase phase
        bool chosen

cdef extern from "base/offset.hpp" namespace "moecomm" nogil:
    cdef cppclass OffsetOfInt64 "moecomm::Offset<int64_t>":
        uint64_t value

cdef extern from "runtime/sim/world.hpp" namespace "moecomm" nogil:
    cdef cppclass Plan:
        PlanView view

    cdef enum class SimSchedule(int32_t):
        roles
        lane
        groups

    cdef cppclass SimConfig:
        int size
        int ranks_per_node
        int num_sms
        Shape shape
        Hardware hardware
        bool payload
        bool decode
        SimSchedule schedule
        int workers
        vector[int32_t] placement

    cdef enum class SimVerb(int32_t):
        dispatch
        combine
        decode_dispatch
        decode_receive
        decode_combine
        decode_sum
        choose
        decode_mask

    cdef cppclass DecodeView:
        uint64_t x(int parity)
        uint64_t scales(int parity, int expert)
        OffsetOfInt64 counts(int parity)
        uint64_t packed_rows()

    cdef cppclass SimDecode:
        uint64_t epoch()
        const DecodeView& view()
        char* memory()

    cdef cppclass SimPart:
        int32_t tokens
        const int64_t* ids
        const float* weights
        const char* x
        const char* scales
        const char* rows
        const float* bias
        int64_t bias_stride
        char* y
        int64_t* slots
        int32_t* counted
        uint32_t routing
        Why refused
        bool strays
        bool absent

    cdef cppclass SimCall:
        SimVerb verb
        int handle
        bool keep
        uint8_t flip
        bool scales_given
        Wire wire
        bool echo_weights
        double before
        Mode mode
        int activate
        CallShape shape
        vector[SimPart] parts

    cdef cppclass SimResult:
        uint64_t begin
        uint64_t end
        Status status
        bool ran
        uint64_t digest

    cdef cppclass SimCluster:
        SimCluster(const SimConfig&) except +
        void reset(const Chaos&, double lead)
        const vector[SimResult]& run(const vector[SimCall]&) except +
        const vector[SimResult]& results()
        SimNet& net()
        const SimConfig& config()
        const Plan* plan(int rank, int handle)
        const char* block(int rank, int handle)
        uint64_t rows(int rank, int handle)
        uint64_t events()
        SimDecode& decode(int rank)

cdef extern from "runtime/sim/explore.hpp" namespace "moecomm" nogil:
    cdef cppclass Finding:
        bool found
        uint64_t schedules
        uint64_t seed
        uint64_t perturbations
        int call
        int rank
        string what
        vector[LogLine] log
        vector[RoleState] stuck

    Finding explore(SimCluster&, const vector[SimCall]&, const Mutation&, uint64_t first_seed, uint64_t count) except +
