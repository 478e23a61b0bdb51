"""A drop-in for deep_ep: its interface over moecomm. docs/deep_ep.md describes how to use it, and the differences."""

import torch

from ._world import configure, shutdown
from .buffer import Buffer
from .config import Config
from .domains import get_logical_domain_size, get_physical_domain_size
from .elastic import ElasticBuffer
from .errors import Unsupported
from .events import EventHandle, EventOverlap
from .handles import EPHandle
from .hybrid_ep_buffer import HybridEPBuffer
from .install import install, path

topk_idx_t = torch.int64
__moecomm__ = True

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "Unsupported",
    "configure",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "install",
    "path",
    "shutdown",
    "topk_idx_t",
]
