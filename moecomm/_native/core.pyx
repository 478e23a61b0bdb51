# cython: language_level=3
# distutils: language=c++
"""The native cpu world. Its parts are modules of this library. Each has one class, or functions only."""
from moecomm._native.loading import load_parts

load_parts(__file__, "shared", ["status", "tensors"])
load_parts(__file__, "cpu_world", [
    "calls", "accounts", "communicator", "block", "plan", "first_phase", "replica_policy", "replica_request",
    "recording", "buffer", "decode_area", "decode", "decode_floor", "domain_memory", "domain", "rate_probe", "tools",
])

from moecomm._native.cpu_world.accounts import ROLES   # no-cython-lint
from moecomm._native.cpu_world.block import Block   # no-cython-lint
from moecomm._native.cpu_world.buffer import Buffer, buffer_bytes   # no-cython-lint
from moecomm._native.cpu_world.replica_policy import ReplicaPolicy   # no-cython-lint
from moecomm._native.cpu_world.replica_request import ReplicaRequest   # no-cython-lint
from moecomm._native.cpu_world.communicator import Communicator   # no-cython-lint
from moecomm._native.cpu_world.decode import Decode, decode_bytes   # no-cython-lint
from moecomm._native.cpu_world.decode_floor import DecodeFloor   # no-cython-lint
from moecomm._native.cpu_world.domain import DOMAIN_RANKS, Domain   # no-cython-lint
from moecomm._native.cpu_world.first_phase import FirstPhase   # no-cython-lint
from moecomm._native.cpu_world.plan import Plan   # no-cython-lint
from moecomm._native.cpu_world.rate_probe import RateProbe   # no-cython-lint
from moecomm._native.cpu_world.recording import Recording   # no-cython-lint
from moecomm._native.cpu_world.tools import count_different, gather_rows, isa, row_kernel_choice   # no-cython-lint
from moecomm._native.cpu_world.tools import set_ucx_folders, sum_rows, time_row_kernels, ucx_version   # no-cython-lint
from moecomm._native.shared.status import PHASES, Failure   # no-cython-lint
from moecomm._native.shared.tensors import read_tensors_of   # no-cython-lint
