"""The verbs of moecomm.fabric: time and rate per verb, size and hop, compared with calls of MPI and a floor.

Contenders alternate, rows are medians, and the results of each contender are checked. The floor is:

    write, read  a memcpy of the same bytes between the same memories in C++, where stores reach the peer's memory;
                 else a copy by torch inside this rank's memory. The record has both (`local_seconds`)
    multicast    one copy of the bytes by every receiver, all at the same time
    ping         a memcpy and a flag in a bare C++ loop (half a round trip)
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import torch

import moecomm
from moecomm import options
from moecomm.fabric import Domain

from . import launch
from .run import world_of

SIZES = "8,1024,65536,1048576,8388608"


def arguments(parser):
    """Add the options of the command."""
    add = parser.add_argument
    add("--nodes", type=options.positive, default=2, help="number of nodes (default 2)")
    add("--ranks-per-node", type=options.positive, default=4, help="ranks per node (default 4)")
    add("--sizes", type=options.sizes, default=SIZES, help=f"bytes, multiples of 8 (default {SIZES})")
    add("--iters", type=options.positive, default=15, help="iterations of each contender (default 15)")
    add("--json", type=options.file_to_write, metavar="FILE", help="append one JSON object per row")


class Contest:
    """Memory and measurements of the contenders."""

    def __init__(self, comm, world, most, iters):
        from mpi4py import MPI

        self.mpi, self.comm, self.world, self.iters = MPI, comm, world, iters
        self.domain = Domain(comm, 4 * most + 4096)
        self.dst = self.domain.tensor(most // 4, torch.float32)
        self.rows = self.domain.tensor(most // 4, torch.float32)
        self.src = torch.empty(most // 4, dtype=torch.float32)
        self.out = torch.empty(most // 4, dtype=torch.float32)
        self.window = MPI.Win.Allocate(most, 4, comm=world.group)
        self.mpi_dst = torch.frombuffer(self.window.tomemory(), dtype=torch.float32)
        self.window.Lock_all()
        self.wrong = 0

    def close(self):
        """Free the memory."""
        self.window.Unlock_all()
        self.window.Free()
        self.domain.close()

    def _seconds(self, contenders, size, ranks):
        """Measure contenders {name: (work, check)} alternately on `ranks`: {name: median seconds of an operation}."""
        times = {name: [] for name in contenders}
        batch = max(1, min(200, 200_000 // size))
        for i in range(self.iters + 2):
            for name, (work, check) in contenders.items():
                self._fresh(size, i)
                self.world.barrier()
                begin = time.perf_counter()
                if self.world.rank in ranks:
                    work(1 if len(ranks) > 1 else batch)
                end = time.perf_counter()
                span = self.world.span(begin, end) if len(ranks) > 1 else (end - begin) / batch
                if i >= 2:
                    times[name].append(span)
                self.world.barrier()
                self.wrong += int(check())
        mine = {name: statistics.median(t) for name, t in times.items()}
        return self.world.allgather(mine)[min(ranks)]

    def _fresh(self, size, i):
        """Write new inputs, and overwrite the results."""
        n = size // 4
        g = torch.Generator().manual_seed(1000 * self.world.rank + i)
        self.src[:n] = torch.randint(-9, 9, (n,), generator=g).float()
        self.rows[:n] = self.src[:n]
        for t in (self.dst, self.mpi_dst, self.out):
            t[:n] = -77

    def _of(self, rank, size, i_of):
        g = torch.Generator().manual_seed(1000 * rank + i_of)
        return torch.randint(-9, 9, (size // 4,), generator=g).float()

    def one_sided(self, verb, hop, size, peer):
        """Measure a write or a read between rank 0 and a peer."""
        n, me, w = size // 4, self.world.rank, self.window
        d, src, out = self.domain, self.src[:n], self.out[:n]
        mine = self.dst[:n]
        count = iter(range(1 << 30))
        writes = verb == "write"

        def by_domain(batch):
            for _ in range(batch):
                d.write(peer, mine, src) if writes else d.read(peer, out, self.rows[:n])
            d.fence()

        def by_mpi(batch):
            array = (src if writes else out).numpy()
            for _ in range(batch):
                w.Put(array, peer) if writes else w.Get(array, peer)
                if not writes:
                    w.Flush(peer)
            w.Flush(peer)

        def local(batch):
            for _ in range(batch):
                mine.copy_(src) if writes else out.copy_(self.rows[:n])

        there = d._heap + ((mine if writes else self.rows).data_ptr() - d._begin)

        def floor(batch):
            d._native.bare_copy(peer, there, (src if writes else out).data_ptr(), size, batch, not writes)

        def check(where, is_mpi):
            def wrong():
                i = next(count) // len(contenders)
                if writes:
                    return me == peer and not torch.equal(where[:n], self._of(0, size, i))
                return me == 0 and not torch.equal(
                    out, self._of(peer, size, i) if not is_mpi else in_mpi_window(i)
                )

            return wrong

        def in_mpi_window(i):
            return torch.full((n,), -77.0)  # written by _fresh

        def uncounted():
            next(count)
            return False

        contenders = {
            "moecomm": (by_domain, check(self.dst, False)),
            "mpi": (by_mpi, check(self.mpi_dst, True)),
            "local": (local, uncounted),
        }
        if d._native.rail_is_mapped() or hop == "node":
            contenders["floor"] = (floor, check(self.dst, False))
        found = self._seconds(contenders, size, {0})
        return {**found, "floor": found.get("floor", found["local"])}

    def together(self, verb, size):
        """Measure a multicast from rank 0 or a reduction to rank 0, against MPI_Bcast and MPI_Reduce."""
        n, me, everyone = size // 4, self.world.rank, range(self.world.size)
        d, src, dst, out = self.domain, self.src[:n], self.dst[:n], self.out[:n]
        mpi = self.world.group
        count = iter(range(1 << 30))
        names = 3 if verb == "multicast" else 2

        def by_domain(_):
            if verb == "multicast":
                d.multicast(everyone, dst, src if me == 0 else None, root=0)
            else:
                d.reduce(everyone, out if me == 0 else None, self.rows[:n], root=0)

        def by_mpi(_):
            if verb == "multicast":
                mpi.Bcast((src if me == 0 else self.mpi_dst[:n]).numpy(), 0)
            else:
                mpi.Reduce(src.numpy(), out.numpy() if me == 0 else None, self.mpi.SUM, 0)

        def check(where, skip_root):
            def wrong():
                i = next(count) // names
                if verb == "multicast":
                    return not (skip_root and me == 0) and not torch.equal(where[:n], self._of(0, size, i))
                return me == 0 and not torch.equal(out, sum(self._of(r, size, i) for r in everyone))

            return wrong

        def uncounted():
            next(count)
            return False

        contenders = {
            "moecomm": (by_domain, check(self.dst, False)),
            "mpi": (by_mpi, check(self.mpi_dst, True)),
        }
        if verb == "multicast":
            contenders["floor"] = (lambda _: self.rows[:n].copy_(src), uncounted)
        d.stats()
        found = self._seconds(contenders, size, set(everyone))
        return found, self._bytes_per_call()

    def _bytes_per_call(self):
        """{hop: (logical, physical)}: bytes of one call, over all ranks."""
        stats = self.world.allgather(self.domain.stats())
        calls = max(stats[0]["calls"], 1)
        return {
            hop: [sum(s[hop][kind] for s in stats) // calls for kind in ("logical_bytes", "physical_bytes")]
            for hop in ("rail", "node")
        }

    def ping(self, size, peer, rounds=2000):
        """Measure half a round trip between rank 0 and a peer, in seconds: with the verbs, and in the bare loop."""
        d, me = self.domain, self.world.rank
        times = {"moecomm": [], "floor": []}
        there = d._heap + (self.dst.data_ptr() - d._begin)
        for i in range(self.iters + 1):
            for name, taken in times.items():
                other, failure = peer - me, None
                done = (
                    d.counter(other, 0) if me in (0, peer) else 0
                )  # equal on both ranks after the last rounds
                self.world.barrier()
                begin = time.perf_counter()
                if me in (0, peer):
                    here, bare = self.src.data_ptr(), name == "floor"
                    failure = d._native.ping(other, there, here, size, rounds, done, bare)
                if i:
                    taken.append((time.perf_counter() - begin) / rounds / 2)
                if any(self.world.allgather(failure is not None)):
                    return None  # the peer's memory is not mapped, so there is no bare loop
        mine = {name: statistics.median(t) for name, t in times.items()}
        return self.world.allgather(mine)[0]


def row_of(verb, hop, size, seconds, moved, world, comm):
    """Make the flat record of one row."""
    own = seconds["moecomm"]
    ratio = {name: seconds.get(name) and seconds[name] / own for name in ("mpi", "floor")}
    return {
        "verb": verb,
        "hop": hop,
        "bytes": size,
        "ranks": world.size,
        "nodes": comm.num_nodes,
        "rail": comm.rail,
        "seconds": own,
        "gigabytes_per_second": size / own / 1e9,
        "mpi_seconds": seconds.get("mpi"),
        "floor_seconds": seconds.get("floor"),
        "local_seconds": seconds.get("local"),
        "speedup_over_mpi": ratio["mpi"],
        "share_of_floor": ratio["floor"],
        **{
            f"{name}_{kind}_bytes": moved[name][i] if moved else None
            for name in ("rail", "node")
            for i, kind in enumerate(("logical", "physical"))
        },
    }


def line_of(row):
    """Format a row of the table."""

    def us(seconds):
        return f"{'-':>10}" if seconds is None else f"{1e6 * seconds:>10.2f}"

    def times(value):
        return f"{'-':>7}" if value is None else f"{value:>7.2f}"

    moved = (
        ""
        if row["rail_physical_bytes"] is None
        else f"{row['rail_logical_bytes']}/{row['rail_physical_bytes']}"
    )
    return (
        f"{row['verb']:<10} {row['hop']:<5} {row['bytes']:>10} {us(row['seconds'])} "
        f"{row['gigabytes_per_second']:>8.2f} {us(row['mpi_seconds'])} {times(row['speedup_over_mpi'])} "
        f"{us(row['floor_seconds'])} {times(row['share_of_floor'])}  {moved}"
    )


HEADER = (
    f"{'verb':<10} {'hop':<5} {'bytes':>10} {'us':>10} {'GB/s':>8} {'MPI us':>10} {'x MPI':>7} "
    f"{'floor us':>10} {'floor':>7}  rail bytes: logical/physical"
)


def rows_of(contest, world, comm, sizes):
    """Measure and yield all rows."""
    peers = {"node": 1} if comm.ranks_per_node > 1 else {}
    if comm.num_nodes > 1:
        peers["rail"] = comm.ranks_per_node
    for hop, peer in peers.items():
        seconds = contest.ping(8, peer)
        if seconds is not None:
            yield row_of("ping", hop, 8, seconds, None, world, comm)
        for verb in ("write", "read"):
            for size in sizes:
                yield row_of(verb, hop, size, contest.one_sided(verb, hop, size, peer), None, world, comm)
    for verb in ("multicast", "reduce"):
        for size in sizes:
            seconds, moved = contest.together(verb, size)
            yield row_of(verb, "both", size, seconds, moved, world, comm)


def main(args):
    """Print a table. The exit status is 1 if a result is wrong."""
    sizes, ranks = [int(word) for word in args.sizes.split(",")], args.nodes * args.ranks_per_node
    if not launch.launched():
        return launch.relaunch(ranks, sys.argv[1:])
    world = world_of(ranks)
    np.seterr(all="raise")
    torch.set_num_threads(1)
    with moecomm.Communicator(world.group, ranks_per_node=args.ranks_per_node) as comm:
        contest = Contest(comm, world, max(sizes), args.iters)
        if world.rank == 0:
            print(
                f"# {args.nodes} x {args.ranks_per_node} ranks, rail {comm.rail}, medians of {args.iters} iterations"
            )
            print(HEADER, flush=True)
        for row in rows_of(contest, world, comm, sizes):
            if world.rank == 0:
                print(line_of(row), flush=True)
                if args.json:
                    with open(args.json, "a") as file:
                        file.write(json.dumps(row) + "\n")
        wrong = sum(world.allgather(contest.wrong))
        contest.close()
    if world.rank == 0 and wrong:
        print(f"# {wrong} results are wrong")
    return 1 if wrong else 0
