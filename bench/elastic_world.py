"""The parts of `bench elastic` that worlds with kills and worlds with joins share: a server, leaks, and the plot."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import moecomm

from .routing import make_inputs

TIMEOUT, DEADLINE = 30.0, 120.0  # seconds: of the communicators; of a whole world


def _want(inputs, here, experts):
    """Expected (y, lost_weight) of a rank, if only the experts `here` exist."""
    kept = here[inputs.ids.clamp(min=0)] & (inputs.ids >= 0)
    factor = torch.exp2((inputs.ids % 3).float()) * kept
    y = (inputs.x[:, None].double() * factor[..., None]).sum(1).to(inputs.x.dtype)
    return y, (inputs.weights * (~kept & (inputs.ids >= 0))).sum(1)


class Server:
    """The steps of one rank.

    Parameters
    ----------
    block : int
        The rank whose tokens and experts these are: a new rank has those of the rank that it replaces.
    asked : dict
        Arguments of Buffer; None: those of the case.
    """

    def __init__(self, comm, case, seed, block, asked=None):
        self.comm, self.case = comm, case
        self.seats = {}  # number of a new rank -> its block
        self.inputs = make_inputs(case, block, seed=seed)
        self.inputs.x = (self.inputs.x * 4).round().clamp(-8, 8).bfloat16()  # integers, so sums are exact
        self.per_rank = case.experts // case.ranks
        shape = dict(hidden=case.hidden, num_experts=case.experts, top_k=case.top_k, max_tokens=case.tokens)
        self.buf = moecomm.Buffer(comm, **(asked or shape))
        mine = torch.arange(block * self.per_rank, (block + 1) * self.per_rank)
        self.factors = torch.exp2((mine % 3).float()).bfloat16()
        self.wants = {}

    def step(self):
        """Run a step; return (y, lost_weight)."""
        out = self.buf.dispatch(self.inputs.x, self.inputs.ids, self.inputs.weights)
        rows = out.handle.rows
        torch.mul(out.x, torch.repeat_interleave(self.factors, out.tokens_per_expert)[:, None], out=rows)
        return self.buf.combine(rows, out.handle), out.lost_weight

    def wrong(self, y, lost):
        """Number of wrong rows."""
        members = self.comm.members
        if members not in self.wants:
            here = torch.zeros(self.case.experts, dtype=torch.bool).view(-1, self.per_rank)
            here[[self.seats.get(uid, uid) for uid in members]] = True
            self.wants[members] = _want(self.inputs, here.flatten(), self.case.experts)
        want, want_lost = self.wants[members]
        bad = (y != want).any(1)
        return int((bad if lost is None else bad | (lost != want_lost)).sum())


def usage():
    """(descriptors, bytes of mappings that other processes may share) of this process."""
    shared = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if any(name in line for name in ("memfd:moecomm", "/dev/shm/", "/SYSV")):
            first, end = (int(n, 16) for n in line.split()[0].split("-"))
            shared += end - first
    return len(os.listdir("/proc/self/fd")), shared


def plot(path, case, served, events):
    """Plot the tokens per second of all ranks, in tenths of a second around events, [(name, time)]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = events[0][1]
    ends = [int((when - zero) // 0.1) for stamps in served for when, _ in stamps]
    bins = range(min(ends), max(ends) + 1)
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    axes.step([b / 10 for b in bins], [ends.count(b) * case.tokens * 10 for b in bins], where="post")
    for name, when in events:
        axes.axvline(when - zero, color="black", lw=0.8)
        axes.annotate(name, (when - zero, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top")
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens per second, all ranks")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
