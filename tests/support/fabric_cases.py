"""Random programs of a Domain's verbs against an oracle: plain tensors, one per rank, moved by torch."""

from __future__ import annotations

import random

import torch
from worlds import assert_same

from moecomm.fabric import Domain, Multicast, Reduce

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def summed(rows, ranks, root, per_node):
    """Return the result of a reduction of rows by rank, bit for bit."""
    wide = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    total = None
    for node in range(len(rows) // per_node):
        part = None
        for r in (r for r in sorted(ranks) if r // per_node == node):
            part = rows[r].to(wide) if part is None else part + rows[r].to(wide)
        if part is None:
            continue
        if node != root // per_node:  # rows on the rail have the dtype of the input
            part = part.to(rows[0].dtype).to(wide)
        total = part if total is None else total + part
    return total.to(rows[0].dtype)


class Program:
    """The same random steps on all ranks. The oracle holds the tensors of all ranks."""

    def __init__(self, comm, seed, long, domain_bytes=1 << 22):
        self.comm, self.rng = comm, random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.domain = Domain(comm, domain_bytes, counters=4)
        self.tensors = []  # (own tensor, [tensors of the oracle by rank])
        for shape in ((9, 5, 8), (70, 24), (3, long)):
            dtype = self.rng.choice(DTYPES)
            mine = self.domain.tensor(shape, dtype)
            everyone = [self.random(shape, dtype) for _ in range(comm.size)]
            mine.copy_(everyone[comm.rank])
            self.tensors.append((mine, everyone))
        self.signaled = torch.zeros(comm.size, comm.size, 4, dtype=torch.int64)  # by source and rank
        comm.barrier()

    def random(self, shape, dtype):
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64).to(dtype)

    def some_ranks(self, least=0):
        return self.rng.sample(range(self.comm.size), self.rng.randint(least, self.comm.size))

    def some_view(self, dims):
        """Return a function that takes the same view of any tensor of these dimensions."""
        picks = []
        for n in dims:
            begin = self.rng.randint(0, n)
            picks.append(slice(begin, self.rng.randint(begin, n), self.rng.choice([1, 1, 1, 2])))
        if self.rng.random() < 0.3:
            picks = [slice(None)] * len(dims)
        turned = self.rng.random() < 0.2
        return lambda t: t[tuple(picks)].transpose(0, -1) if turned else t[tuple(picks)]

    def odd_strides(self, t):
        """Return an equal tensor that is not contiguous."""
        wide = t.new_empty((*t.shape[:-1], 2 * t.shape[-1] + 1))
        wide[..., 1::2] = t
        return wide[..., 1::2] if self.rng.random() < 0.4 else t.clone()

    def step(self):
        """Run one verb on all ranks, then compare the tensors of all ranks with the oracle."""
        kind = self.rng.choice(["write", "write", "read", "rows", "multicast", "reduce", "several"])
        getattr(self, "step_" + kind)()
        self.domain.fence()
        self.comm.barrier()
        for i, (mine, everyone) in enumerate(self.tensors):
            assert_same(mine, everyone[self.comm.rank], f"{kind}: tensor {i} of rank {self.comm.rank}")
        self.comm.barrier()

    def step_write(self):
        source, dest = (self.rng.randrange(self.comm.size) for _ in range(2))
        mine, everyone = self.rng.choice(self.tensors)
        view, number = self.some_view(mine.shape), self.rng.randrange(4)
        new = self.odd_strides(self.random(view(mine).shape, mine.dtype))
        self.signaled[source, dest, number] += new.numel() * new.element_size()
        if self.comm.rank == source:
            pending = self.domain.write(
                dest, view(mine), new, counter=number, async_op=self.rng.random() < 0.3
            )
            if pending:
                pending.wait()
        else:
            self.rng.random()
        view(everyone[dest]).copy_(new)
        if self.comm.rank == dest:
            self.domain.wait(source, number, int(self.signaled[source, dest, number]))
            assert self.domain.counter(source, number) == self.signaled[source, dest, number]

    def step_read(self):
        reader, source = (self.rng.randrange(self.comm.size) for _ in range(2))
        mine, everyone = self.rng.choice(self.tensors)
        view = self.some_view(mine.shape)
        if self.comm.rank == reader:
            got = self.odd_strides(torch.full_like(view(mine), 7))
            self.domain.read(source, got, view(mine))
            assert_same(got.contiguous(), view(everyone[source]).contiguous(), f"read from {source}")
        else:
            self.odd_strides(torch.empty(1, 1))

    def step_rows(self):
        source, dest = (self.rng.randrange(self.comm.size) for _ in range(2))
        mine, everyone = self.tensors[1]
        n = self.rng.randint(0, 20)
        to, of = (
            torch.randperm(70, generator=self.numbers)[:n],
            torch.randint(0, 30, (n,), generator=self.numbers),
        )
        new = self.random((30, 24), mine.dtype)
        if self.comm.rank == source:
            self.domain.write(dest, mine, new, dst_rows=to.int() if n % 2 else to, src_rows=of)
        everyone[dest][to] = new[of]

    def multicast(self, tensor):
        mine, everyone = tensor
        root, ranks, view = self.rng.randrange(self.comm.size), self.some_ranks(), self.some_view(mine.shape)
        new = self.odd_strides(self.random(view(mine).shape, mine.dtype))
        for r in ranks:
            view(everyone[r]).copy_(new)
        return Multicast(ranks, view(mine), root, new if self.comm.rank == root else None)

    def step_multicast(self):
        m = self.multicast(self.rng.choice(self.tensors))
        self.domain.multicast(m.ranks, m.dst, m.src, root=m.root)

    def step_several(self):
        self.domain.submit([self.multicast(t) for t in self.tensors])

    def reduction(self, tensor):
        mine, everyone = tensor
        root, ranks, view = self.rng.randrange(self.comm.size), self.some_ranks(1), self.some_view(mine.shape)
        got = self.odd_strides(torch.full_like(view(mine), 7))
        want = summed([view(t) for t in everyone], ranks, root, self.comm.ranks_per_node)
        wide = torch.float64 if mine.dtype == torch.float64 else torch.float32
        here = self.comm.rank == root
        return Reduce(ranks, view(mine), root, got if here else None, accumulate=wide), got, want

    def step_reduce(self):
        made = [self.reduction(t) for t in self.rng.sample(self.tensors, self.rng.randint(1, 3))]
        self.domain.submit([request for request, _, _ in made])
        for request, got, want in made:
            if request.root == self.comm.rank:
                assert_same(got.contiguous(), want.contiguous(), f"sum of {request.ranks} at {request.root}")


def check_program(comm, seed, steps, long=6001):
    """Run one program, then close the domain."""
    program = Program(comm, seed, long)
    for _ in range(steps):
        program.step()
    stats = program.domain.stats()
    comm.barrier()
    program.domain.close()
    return stats
