"""Launchers: the rank and size of this process in the environment variables of the launcher that has started it."""

from __future__ import annotations

from typing import Any

import os
from dataclasses import dataclass

from ..errors import InvalidArgument

HOW = (
    "pass the group: Communicator(torch.distributed.group.WORLD), Communicator(mpi4py.MPI.COMM_WORLD) or "
    'Communicator("alone"); or set MOECOMM_GROUP to torch, env, mpi, slurm or alone'
)


@dataclass(frozen=True)
class Claim:
    """The rank and size from the variables of one launcher. None: there is no such variable."""

    kind: str  # env: RANK and WORLD_SIZE, as torchrun sets them; mpi; slurm
    source: str
    rank: int | None
    size: int | None

    def __str__(self) -> str:
        rank = "no rank" if self.rank is None else f"rank {self.rank}"
        return f"{self.source} ({rank} of {'?' if self.size is None else self.size})"


# (kind, variable of the rank, variable of the size) of each launcher, the innermost first. Slurm is apart, because
# other launchers run inside its steps.
_LAUNCHERS = (
    ("env", "RANK", "WORLD_SIZE"),
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpi", "PMI_RANK", "PMI_SIZE"),
    ("mpi", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("mpi", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("mpi", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("mpi", "PALS_RANKID", "PALS_SIZE"),
)
# Variables of launchers without one for the size. MPI knows the size.
_SIGNS = (("mpi", "PMIX_RANK"), ("mpi", "MPI_LOCALNRANKS"))
_RAY = "RAY_RAYLET_PID"  # set in every worker process of Ray
# The first step id of Slurm for special steps: an interactive shell, the batch script. They are not parallel jobs.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def _number(e: Any, name: Any) -> Any:
    if name not in e:
        return None
    try:
        value = int(e[name])
    except ValueError:
        value = -1
    if value < 0:
        raise InvalidArgument(
            f"{name} is {e[name]!r} in the environment; expected an integer >= 0, or no such variable. Otherwise {HOW}",
            op="Communicator",
        )
    return value


def slurm(e: Any = os.environ) -> Any:
    """Return the Claim of srun, or None.

    The shell of salloc and the batch script also have variables of the job, but they are single processes.
    """
    step = e.get("SLURM_STEP_ID", e.get("SLURM_STEPID", ""))
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP or "SLURM_PROCID" not in e:
        return None
    return Claim(
        "slurm",
        "SLURM_PROCID and SLURM_STEP_NUM_TASKS",
        _number(e, "SLURM_PROCID"),
        _number(e, "SLURM_STEP_NUM_TASKS"),
    )


def claims(e: Any = os.environ) -> Any:
    """Return the Claims of all launchers with variables in the environment; Slurm only if no other has a size."""
    found = []
    for kind, rank, size in _LAUNCHERS:
        present = [name for name in (rank, size) if name in e]
        if present:
            found.append(Claim(kind, " and ".join(present), _number(e, rank), _number(e, size)))
    if not any(c.size is not None for c in found):
        found += [
            Claim(kind, name, _number(e, name) if name == "PMIX_RANK" else None, None)
            for kind, name in _SIGNS
            if name in e
        ]
    if _RAY in e and not found:
        found.append(Claim("ray", _RAY, None, None))
    step = None if any(c.size is not None for c in found) else slurm(e)
    return found + ([step] if step else [])


def require_agreement(said: Any) -> None:
    """Refuse launchers that contradict each other.

    Parameters
    ----------
    said : list of Claim

    Raises
    ------
    InvalidArgument
        Two claims differ. The message names both.
    """
    for name in ("size", "rank"):
        known = [c for c in said if getattr(c, name) is not None]
        for other in known[1:]:
            if getattr(other, name) != getattr(known[0], name):
                raise InvalidArgument(
                    f"group is None, and {known[0]} and {other} contradict each other; expected equal ranks and sizes. "
                    f"To choose one, {HOW}",
                    op="Communicator",
                )
    for c in said:
        if c.rank is not None and c.size is not None and c.rank >= c.size:
            raise InvalidArgument(
                f"group is None, and {c} is invalid; expected a rank below the size. To choose another group, {HOW}",
                op="Communicator",
            )


def meeting_point(e: Any, claim: Any) -> Any:
    """Return (host, port) of the store: MASTER_ADDR and MASTER_PORT, or values derived from Slurm; else None."""
    if "MASTER_ADDR" in e and "MASTER_PORT" in e:
        return e["MASTER_ADDR"], _number(e, "MASTER_PORT")
    if claim.kind != "slurm":
        return None
    if e.get("SLURM_STEP_NUM_NODES", e.get("SLURM_NNODES")) == "1":
        host = "127.0.0.1"
    else:
        host = e.get("MASTER_ADDR") or first_host(
            e.get("SLURM_STEP_NODELIST", e.get("SLURM_JOB_NODELIST", ""))
        )
    if not host:
        return None
    # A different port for each step, below the range of ephemeral ports.
    step = int(e.get("SLURM_STEP_ID", e.get("SLURM_STEPID", "0")))
    return host, _number(e, "MASTER_PORT") or 15000 + (int(e.get("SLURM_JOB_ID", "0")) * 31 + step) % 15000


def first_host(nodes: Any) -> Any:
    """Return the first host of a compressed list of Slurm: node07 for node[07-12,20],other3."""
    head, bracket, rest = nodes.partition("[")
    if "," in head or not bracket:
        return head.split(",")[0]
    inner, _, tail = rest.partition("]")
    return head + inner.split(",")[0].split("-")[0] + tail.split(",")[0]
