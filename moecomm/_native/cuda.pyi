"""Types of the cuda world, by module of its library."""

from .cuda_world.block import Block as Block
from .cuda_world.buffer import Buffer as Buffer, device_limits as device_limits, shared_bytes as shared_bytes
from .cuda_world.calls import Calls as Calls
from .cuda_world.codes import (
    decode_rows as decode_rows,
    dequantize as dequantize,
    encode_rows as encode_rows,
    quantize as quantize,
    transpose_requantize as transpose_requantize,
)
from .cuda_world.counts import Counts as Counts
from .cuda_world.decode import Decode as Decode
from .cuda_world.decode_area import DecodeArea as DecodeArea
from .cuda_world.domain import Domain as Domain
from .cuda_world.domain_memory import DomainMemory as DomainMemory
from .cuda_world.ipc_sample import IpcSample as IpcSample
from .cuda_world.plan import Plan as Plan
from .cuda_world.peer_access import (
    PeerAccess as PeerAccess,
    nccl_headers as nccl_headers,
    nccl_unique_id as nccl_unique_id,
)
from .shared.status import Failure as Failure
