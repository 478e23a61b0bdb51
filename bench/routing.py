"""Inputs of a case: tokens and picks of each rank. Equal arguments give equal inputs.

Iteration i of a benchmark uses tokens i, i+1, ... So every iteration moves other rows with another routing, and
results of an earlier iteration are wrong for a later one.
"""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moecomm import InvalidArgument, archives, gate, record
from moecomm.tracing.check import picks_error

TORCH_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass
class Inputs:
    """Tokens of one rank: x [T, hidden], ids int64 [T, top_k], weights float32 [T, top_k]."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def make_inputs(case, rank, spare=0, seed=0):
    """Make the inputs of one rank for a case: its tokens, and `spare` more for later iterations."""
    tokens = case.tokens_of(rank) + spare
    generator = torch.Generator().manual_seed(1000003 * seed + rank)
    router = torch.Generator().manual_seed(7919 + seed)  # equal on all ranks
    is_ids = case.routing.endswith((".npy", ".npz")) or Path(case.routing).is_dir()
    if case.routing in ("uniform", "zipf") or is_ids:
        x = torch.randn((tokens, case.hidden), generator=generator)
    else:
        x = embed(words_of(case, rank, tokens), case.hidden, seed)
    if is_ids:
        ids, weights = read_ids(case, rank, tokens)
    elif case.routing in ("uniform", "zipf"):
        logits = torch.randn((tokens, case.experts), generator=generator)
        if case.routing == "zipf":  # expert popularity 1/1, 1/2, 1/3 ..., in random order
            order = torch.randperm(case.experts, generator=router) + 1
            logits = -torch.log(
                -torch.log(torch.rand((tokens, case.experts), generator=generator).clamp_min(1e-9))
            ) - torch.log(order)
        ids, weights = gate.sigmoid_gate(
            logits, case.top_k, num_groups=case.groups, top_groups=case.top_groups
        )
    else:
        router_weight = torch.randn((case.hidden, case.experts), generator=router) / case.hidden**0.5
        ids, weights = gate.sigmoid_gate(
            x @ router_weight, case.top_k, num_groups=case.groups, top_groups=case.top_groups
        )
    if case.masked:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < case.masked, -1)
    return Inputs(x.to(TORCH_DTYPES[case.dtype]), ids.contiguous(), weights.float().contiguous())


# -- routing from files --------------------------------------------------------------------------------


def read_ids(case, rank, tokens):
    """Read ids and weights from the folder of a recording, or from a file with [ranks, T, top_k] or [T, top_k].

    [T, top_k] is distributed over the ranks. Short inputs are repeated. An .npy file has ids, an .npz file "ids" and
    optionally "weights".
    """
    if Path(case.routing).is_dir():
        return recorded_ids(case, rank, tokens)
    if case.routing.endswith(".npz"):
        loaded = archives.read_archive("--routing", case.routing, ("ids",), optional=("weights",))
        ids, weights = loaded["ids"], loaded.get("weights")
    else:
        ids, weights = archives.read_array("--routing", case.routing), None
    if (
        ids.dtype.kind not in "iu"
        or ids.size == 0
        or ids.ndim not in (2, 3)
        or ids.shape[-1] != case.top_k
        or (ids.ndim == 3 and ids.shape[0] != case.ranks)
    ):
        archives.refuse(
            "--routing",
            case.routing,
            "ids",
            f"is {ids.dtype} {list(ids.shape)}",
            f"integers [T, {case.top_k}] or [{case.ranks}, T, {case.top_k}]",
        )
    if error := picks_error(ids.astype(np.int64).reshape(-1, case.top_k), case.experts):
        archives.refuse("--routing", case.routing, *error)
    if weights is not None and (weights.dtype.kind != "f" or weights.shape != ids.shape):
        archives.refuse(
            "--routing",
            case.routing,
            "weights",
            f"is {weights.dtype} {list(weights.shape)}",
            f"floats {list(ids.shape)} like ids",
        )

    def mine(array):
        own = array[rank] if array.ndim == 3 else array[rank :: case.ranks]
        return torch.from_numpy(np.resize(own, (tokens, case.top_k)))

    ids = mine(ids.astype(np.int64))
    return ids, torch.full(ids.shape, 1 / case.top_k) if weights is None else mine(weights.astype(np.float32))


def recorded_ids(case, rank, tokens):
    """Ids and weights of a recording: all plans in order, redistributed if it has another number of ranks."""
    recording = record.load(case.routing)
    if recording[0].header["top_k"] != case.top_k or recording[0].header["num_experts"] != case.experts:
        raise InvalidArgument(
            f"--routing: {case.routing} has top-{recording[0].header['top_k']} of "
            f"{recording[0].header['num_experts']} experts; "
            f"expected top-{case.top_k} of {case.experts}",
            op="bench",
        )
    sources = [recording[rank]] if len(recording) == case.ranks else recording
    if not sum(len(i) for r in sources for i in r.ids):
        raise InvalidArgument(
            f"--routing: {case.routing} has no tokens; expected a recording with tokens", op="bench"
        )
    ids = np.concatenate([i for r in sources for i in r.ids]).astype(np.int64)
    weights = np.concatenate(
        [
            np.full(i.shape, 1 / case.top_k) if w is None else w
            for r in sources
            for i, w in zip(r.ids, r.weights)
        ]
    )
    if len(recording) != case.ranks:
        ids, weights = ids[rank :: case.ranks], weights[rank :: case.ranks]
    shape = (tokens, case.top_k)
    return torch.from_numpy(np.resize(ids, shape)), torch.from_numpy(
        np.resize(weights, shape).astype(np.float32)
    )


# -- routing from text ---------------------------------------------------------------------------------


def text_files():
    """Source files and docs of this machine, in an order that depends only on their names."""
    found = []
    for folder, patterns in (
        (Path(re.__file__).parents[1], ("*.py", "email/*.py", "json/*.py", "http/*.py", "asyncio/*.py")),
        (Path(torch.__file__).parent, ("*.py", "nn/*.py", "optim/*.py", "distributed/*.py")),
        (Path("/usr/share/doc"), ("*/copyright", "*/README*", "*/*.txt", "*/NEWS*")),
        (Path(sys.prefix), ("lib/python*/site-packages/*/*.py",)),
    ):
        for pattern in patterns:
            found += [
                p
                for p in folder.glob(pattern)
                if p.is_file() and 4096 <= p.stat().st_size <= 262144 and p.suffix != ".gz"
            ]
    return sorted(set(found), key=lambda p: (zlib.crc32(p.name.encode()), str(p)))


def words_of(case, rank, tokens):
    """Words of a rank, from text files of this machine (different files per rank) or from the file of --routing."""
    if case.routing == "text":
        files = text_files()[rank :: case.ranks]
    else:
        files = [Path(case.routing)]
        if not files[0].is_file():
            raise InvalidArgument(
                f"--routing is {case.routing}; expected uniform, zipf, text or a file", op="bench"
            )
    words = []
    for path in files:
        words += tokenize(archives.read_text("--routing", path))
        if len(words) >= case.ranks * tokens:
            break
    if not words:
        raise InvalidArgument(f"--routing: {case.routing} has no words; expected text", op="bench")
    first = 0 if case.routing == "text" else rank * tokens  # ranks use different parts of one file
    return [words[(first + i) % len(words)] for i in range(tokens)]


def tokenize(text):
    """Split text into parts of words with at most eight letters, single digits and single signs."""
    return re.findall(r"[^\W\d_]{1,8}|\d|[^\w\s]|_", text)


def embed(words, hidden, seed=0):
    """Hidden states float32 [T, hidden]: each word has a random vector, and a token depends on the words before it."""
    vectors = {
        w: torch.randn(hidden, generator=torch.Generator().manual_seed(zlib.crc32(w.encode()) + seed))
        for w in set(words)
    }
    own = torch.stack([vectors[w] for w in words])
    state = own.clone()
    for back, share in ((1, 0.5), (2, 0.25), (3, 0.125)):
        state[back:] += share * own[:-back]
    return state / state.pow(2).mean(-1, keepdim=True).sqrt()
