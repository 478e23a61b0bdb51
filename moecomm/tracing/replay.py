"""`python -m moecomm replay PATH`: replays a recording in the cpu or the sim world and compares the traffic.

With the recorded number of ranks, rows and bytes per hop must be equal. With another number the tokens of every step
are redistributed over the ranks, so rows and bytes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
import argparse

import json
import time
from dataclasses import dataclass

import numpy as np
import torch

from .. import options

from . import record
from ..buffer import Buffer
from ..errors import InvalidArgument
from ..local import MOST_RANKS, run_local


@dataclass
class Script:
    """The calls of all ranks: geometry, arguments of the Buffer, calls, and picks and weights by plan and rank."""

    size: int
    ranks_per_node: int
    buffer: dict[str, Any]
    calls: np.ndarray  # [calls, ranks]
    ids: list[Any]  # [plan][rank] int64 Tensor [T, top_k]
    weights: list[Any]  # [plan][rank] float32 Tensor or None

    @property
    def dtype(self) -> Any:
        """Dtype of the rows in combine."""
        return getattr(torch, self.buffer["dtype"])


@dataclass
class Replayed:
    """Result of a replay.

    Attributes
    ----------
    traffic : array uint64 [ranks, len(record.HOPS)]
        Sum over all calls.
    seconds : array float64 [calls]
        Time of the slowest rank.
    """

    traffic: np.ndarray
    seconds: np.ndarray


def script_of(ranks: Sequence[Any], size: int | None = None) -> Any:
    """Make the Script of a recording (record.load). If `size` differs, redistribute the tokens over `size` ranks.

    Raises
    ------
    InvalidArgument
        There are no calls, or the number of experts is not a multiple of size.
    """
    if not len(ranks[0].calls):
        raise InvalidArgument(
            "recording: no call has been written by all ranks; expected at least one", op="replay"
        )
    header = ranks[0].header
    buffer = {
        name: header[name] for name in ("hidden", "num_experts", "top_k", "max_tokens", "dtype", "channels")
    }
    calls = np.stack([r.calls for r in ranks], axis=1)
    ids = [[torch.from_numpy(r.ids[p].astype(np.int64)) for r in ranks] for p in range(len(ranks[0].ids))]
    weights = [
        [None if r.weights[p] is None else torch.from_numpy(r.weights[p]) for r in ranks]
        for p in range(len(ids))
    ]
    script = Script(header["size"], header["ranks_per_node"], buffer, calls, ids, weights)
    return script if size in (None, script.size) else _redistributed(script, size)


def _redistributed(script: Any, size: int) -> Any:
    if size < 1 or script.buffer["num_experts"] % size:
        raise InvalidArgument(
            f"--ranks is {size}; expected a divisor of the {script.buffer['num_experts']} experts",
            op="replay",
        )
    _require_one_order(script, "--ranks", size)
    per_node = next(p for p in range(min(script.ranks_per_node, size), 0, -1) if size % p == 0)

    def split(parts: Any) -> Any:
        return None if parts[0] is None else list(torch.cat(parts).tensor_split(size))

    ids, weights = (
        [split(p) for p in script.ids],
        [split(_all_or_none(p, "--ranks", size) or [None]) or [None] * size for p in script.weights],
    )
    calls = np.repeat(script.calls[:, :1], size, axis=1)
    for call in calls:
        for rank in range(size):
            call[rank]["tokens"] = len(ids[call[rank]["plan"]][rank])
    buffer = dict(script.buffer, max_tokens=max([1, *(len(t) for plan in ids for t in plan)]))
    return Script(size, per_node, buffer, calls, ids, weights)


def on_cpu(script: Any) -> Any:
    """Replay a Script with rank threads and random rows. Returns Replayed.

    Raises
    ------
    InvalidArgument
        The Script has more ranks than run_local allows.
    """
    if script.size > MOST_RANKS:
        raise InvalidArgument(
            f"--ranks is {script.size}; expected at most {MOST_RANKS}, because the cpu world runs every rank as a "
            "thread, or --world sim",
            op="replay",
        )

    def main(comm: Any) -> Any:
        buf = Buffer(comm, **dict(script.buffer, dtype=script.dtype))
        generator = torch.Generator().manual_seed(comm.rank)
        outs: dict[int, Any] = {}
        hooks: dict[int, Any] = {}
        spans: list[Any] = []
        for call in script.calls[:, comm.rank]:
            x = torch.randn(
                (int(call["tokens"]), script.buffer["hidden"]),
                generator=generator,
                dtype=torch.float32,
                device="cpu",
            ).to(script.dtype)
            op, plan, coding = str(call["op"]), int(call["plan"]), str(call["coding"]) or None
            ids, weights = (
                script.ids[plan][comm.rank],
                script.weights[plan][comm.rank] if call["weighted"] else None,
            )
            comm.barrier()
            began = time.perf_counter()
            if op == "combine":
                handle = outs[plan].handle
                buf.combine(
                    handle.rows,
                    handle,
                    topk_weights=outs[plan].topk_weights if call["weighted"] else None,
                    wire=coding,
                )
            elif op == "decode_combine":
                handle = outs[plan].handle
                _, hooks[plan] = buf.decode_combine(handle.rows, ids, weights, handle, wire=coding)
            elif op in ("decode_receive", "decode_sum"):
                hooks[plan]()
            elif call["cached"]:
                buf.dispatch(x, handle=outs[plan].handle, quant=coding)
            else:
                if op == "decode_dispatch":
                    outs[plan], hooks[plan] = buf.decode_dispatch(x, ids, topk_weights=weights, quant=coding)
                else:
                    outs[plan] = buf.dispatch(
                        x,
                        ids,
                        weights,
                        layout=str(call["layout"]),
                        expert_alignment=int(call["alignment"]),
                        capacity=None if call["capacity"] < 0 else int(call["capacity"]),
                        quant=coding,
                    )
                for old in [p for p in outs if p < plan and p not in script.calls["plan"][len(spans) :]]:
                    del outs[old]  # not used by later calls
            spans.append((began, time.perf_counter()))
        natives = buf.backend.memory.natives()
        traffic = np.sum([np.array(native.counters(), np.uint64) for native in natives], axis=0)
        comm.barrier()
        buf.close()
        return traffic, spans

    results = run_local(main, script.size, ranks_per_node=script.ranks_per_node)
    spans = np.array([spans for _, spans in results])  # [ranks, calls, 2]
    return Replayed(np.stack([t for t, _ in results]), spans[:, :, 1].max(0) - spans[:, :, 0].min(0))


def on_sim(script: Any, hardware: Any = None) -> Any:
    """Replay a Script in the sim world, without payload. Returns Replayed, with times of the virtual clock.

    Raises
    ------
    InvalidArgument
        The ranks made calls that differ in a way that the sim world cannot replay.
    """
    from ..sim import Cluster, Hardware

    _require_one_order(script, "--world", "sim")
    decoding = {op for op in script.calls["op"][:, 0] if op in record.DECODE_OPS}
    cluster = Cluster(
        script.size,
        ranks_per_node=script.ranks_per_node,
        hardware=hardware or Hardware(),
        decode=bool(decoding),
        **dict(script.buffer, dtype=script.dtype),
    )
    program = cluster.program()
    last = -1  # plan of the last decode dispatch; phases of the one before may follow it
    for call, coding in zip(script.calls[:, 0], script.calls["coding"]):
        if len(set(coding)) > 1:
            raise InvalidArgument(
                f"--world is 'sim'; expected 'cpu', because ranks used different codings in one call: "
                f"{sorted(set(coding))}",
                op="replay",
            )
        op, plan = str(call["op"]), int(call["plan"])
        weights = _all_or_none(script.weights[plan], "--world", "sim") if call["weighted"] else None
        if op == "decode_dispatch":
            program.decode_dispatch(script.ids[plan], weights, quant=str(call["coding"]) or None)
            last = plan
            continue
        if op == "decode_combine":
            program.decode_combine(weights, wire=str(call["coding"]) or None, earlier=plan != last)
            continue
        if op in ("decode_receive", "decode_sum"):
            program.decode_hook(after_combine=op == "decode_sum", earlier=plan != last)
            continue
        if op == "combine":
            program.combine(handle=plan, wire=str(call["coding"]) or None)
            continue
        program.dispatch(
            None if call["cached"] else script.ids[plan],
            weights,
            handle=plan,
            layout=str(call["layout"]),
            expert_alignment=int(call["alignment"]),
            capacity=None if call["capacity"] < 0 else int(call["capacity"]),
            quant=str(call["coding"]) or None,
        )
    cluster.reset()
    times = cluster.run(program)  # [calls, ranks, 2]
    stats = [
        [
            s[hop][f"{kind}_{unit}"]
            for hop in ("rail", "node")
            for kind, unit in (
                ("logical", "rows"),
                ("physical", "rows"),
                ("logical", "bytes"),
                ("physical", "bytes"),
            )
        ]
        + [s["replicated_rows"]]
        for s in cluster.stats()
    ]
    return Replayed(np.array(stats, np.uint64), (times[:, :, 1].max(1) - times[:, :, 0].min(1)) / 1e6)


def _all_or_none(weights: Any, name: str, value: Any) -> Any:
    """Weights of a plan by rank, or None if no rank has weights."""
    given = [w is not None for w in weights]
    if any(given) and not all(given):
        raise InvalidArgument(
            f"{name} is {value!r}; expected the recorded number of ranks in the cpu world, because rank "
            f"{given.index(False)} had no weights in a call in which other ranks had",
            op="replay",
        )
    return weights if all(given) else None


def _require_one_order(script: Any, name: str, value: Any) -> None:
    if (script.calls["op"] != script.calls["op"][:, :1]).any():
        raise InvalidArgument(
            f"{name} is {value!r}; expected the recorded number of ranks in the cpu world, because ranks called their "
            "decode hooks in different orders",
            op="replay",
        )


def recorded(script: Any) -> Any:
    """The traffic and times in the recording, as Replayed."""
    traffic = np.stack([script.calls[name].sum(0) for name in record.HOPS], axis=1)
    return Replayed(traffic, (script.calls["end_ns"] - script.calls["begin_ns"]).max(1) / 1e9)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("path", help="the folder that Buffer(..., record=PATH) wrote")
    parser.add_argument("--world", choices=("cpu", "sim"), default="cpu", help="where to replay")
    parser.add_argument("--ranks", type=options.ranks, help="number of ranks; default: as recorded")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Replay and print the comparison. The exit status is 1 if rows or bytes differ on the recorded ranks."""
    original = script_of(record.load(args.path))
    script = script_of(record.load(args.path), args.ranks)
    was, now = recorded(original), (on_cpu if args.world == "cpu" else on_sim)(script)
    before, after = was.traffic.sum(0), now.traffic.sum(0)
    same_ranks = script.size == original.size
    equal = bool(same_ranks and (was.traffic == now.traffic).all())
    medians = {
        op: [1e6 * float(np.median(r.seconds[original.calls["op"][:, 0] == op])) for r in (was, now)]
        for op in ("dispatch", "combine", *record.DECODE_OPS)
        if (original.calls["op"][:, 0] == op).any()
    }
    if args.json:
        print(
            json.dumps(
                dict(
                    world=args.world,
                    ranks=script.size,
                    calls=len(script.calls),
                    equal=equal,
                    median_us=medians,
                    recorded=dict(zip(record.HOPS, map(int, before))),
                    replayed=dict(zip(record.HOPS, map(int, after))),
                )
            )
        )
        return 0 if equal or not same_ranks else 1
    print(
        f"{len(script.calls)} calls, recorded on {original.size} ranks ({original.ranks_per_node} per node), "
        f"replayed on {script.size} ({script.ranks_per_node} per node) in the {args.world} world"
    )
    print(f"{'':24}{'recorded':>18}{'replayed':>18}")
    for name, a, b in zip(record.HOPS, before, after):
        print(f"{name.replace('_', ' '):24}{a:18}{b:18}{'' if a == b else '   differs'}")
    for op, (a, b) in medians.items():
        print(f"{op + ' median us':24}{a:18.1f}{b:18.1f}")
    print(
        "rows and bytes are equal on every rank"
        if equal
        else "rows or bytes DIFFER"
        if same_ranks
        else "the number of ranks is not the recorded one, so rows and bytes differ"
    )
    return 0 if equal or not same_ranks else 1
