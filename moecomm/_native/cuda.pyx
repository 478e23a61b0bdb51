# cython: language_level=3
# distutils: language=c++
"""The native cuda world. Its parts are modules of this library. Each has one class, or functions only."""
from moecomm._native import core   # no-cython-lint - loads the parts that all worlds share
from moecomm._native.loading import load_parts

load_parts(__file__, "cuda_world", [
    "block", "counts", "plan", "peer_access", "calls", "buffer", "decode_area", "decode", "codes", "domain_memory",
    "domain", "ipc_sample",
])

from moecomm._native.cuda_world.block import Block   # no-cython-lint
from moecomm._native.cuda_world.buffer import Buffer, device_limits, shared_bytes   # no-cython-lint
from moecomm._native.cuda_world.calls import Calls   # no-cython-lint
from moecomm._native.cuda_world.codes import decode_rows, dequantize, encode_rows, quantize   # no-cython-lint
from moecomm._native.cuda_world.codes import transpose_requantize   # no-cython-lint
from moecomm._native.cuda_world.counts import Counts   # no-cython-lint
from moecomm._native.cuda_world.decode import Decode   # no-cython-lint
from moecomm._native.cuda_world.decode_area import DecodeArea   # no-cython-lint
from moecomm._native.cuda_world.domain import Domain   # no-cython-lint
from moecomm._native.cuda_world.domain_memory import DomainMemory   # no-cython-lint
from moecomm._native.cuda_world.ipc_sample import IpcSample   # no-cython-lint
from moecomm._native.cuda_world.plan import Plan   # no-cython-lint
from moecomm._native.cuda_world.peer_access import PeerAccess, nccl_headers, nccl_unique_id   # no-cython-lint
from moecomm._native.shared.status import Failure   # no-cython-lint
