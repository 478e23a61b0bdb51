"""Collectives other than dispatch and combine: sums of gradients, and agreement on the data."""

from __future__ import annotations

import torch
import torch.distributed as dist

import moecomm
from moecomm.errors import ConfigMismatch, InvalidArgument


def sum_over_ranks(comm: moecomm.Communicator, tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, with one all-reduce of torch.distributed or MPI.

    Raises
    ------
    InvalidArgument
        The ranks were started neither by torchrun nor by mpirun.
    """
    if comm.size == 1 or not tensors:
        return
    flat = torch.cat([t.detach().flatten().double() for t in tensors])
    if dist.is_initialized():
        dist.all_reduce(flat)
    else:
        from mpi4py import MPI

        if comm.size != MPI.COMM_WORLD.size:
            raise InvalidArgument(
                f"comm has {comm.size} ranks and MPI has {MPI.COMM_WORLD.size}; expected a program started by torchrun "
                "or mpirun",
                op="sum_over_ranks",
            )
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, flat.numpy())
    with torch.no_grad():
        for t, s in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(s.view_as(t))


def agree(comm: moecomm.Communicator, name: str, value: str) -> None:
    """Check that a hexadecimal number, given as text, is equal on all ranks.

    Raises
    ------
    ConfigMismatch
        It is not equal. Raised on all ranks.
    """
    everyone = torch.zeros(comm.size, dtype=torch.float64)
    everyone[comm.rank] = float(int(value, 16) % 2**48)  # exact in float64
    own = everyone[comm.rank].clone()
    sum_over_ranks(comm, [everyone])
    if bool((everyone != own).any()):
        raise ConfigMismatch(
            f"{name}: rank {comm.rank} has {value}, and another rank has another value; expected the same on all ranks",
            op="agree",
            rank=comm.rank,
        )
