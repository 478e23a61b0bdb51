"""Types of the native cpu world, from the modules of its library."""

from .cpu_world.accounts import ROLES as ROLES
from .cpu_world.block import Block as Block
from .cpu_world.buffer import Buffer as Buffer, buffer_bytes as buffer_bytes
from .cpu_world.replica_policy import ReplicaPolicy as ReplicaPolicy
from .cpu_world.replica_request import ReplicaRequest as ReplicaRequest
from .cpu_world.communicator import Communicator as Communicator
from .cpu_world.decode import Decode as Decode, decode_bytes as decode_bytes
from .cpu_world.decode_floor import DecodeFloor as DecodeFloor
from .cpu_world.domain import DOMAIN_RANKS as DOMAIN_RANKS, Domain as Domain
from .cpu_world.first_phase import FirstPhase as FirstPhase
from .cpu_world.plan import Plan as Plan
from .cpu_world.rate_probe import RateProbe as RateProbe
from .cpu_world.recording import Recording as Recording
from .cpu_world.tools import (
    count_different as count_different,
    gather_rows as gather_rows,
    isa as isa,
    row_kernel_choice as row_kernel_choice,
    set_ucx_folders as set_ucx_folders,
    sum_rows as sum_rows,
    time_row_kernels as time_row_kernels,
    ucx_version as ucx_version,
)
from .shared.status import PHASES as PHASES, Failure as Failure
from .shared.tensors import read_tensors_of as read_tensors_of
