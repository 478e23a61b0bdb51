"""All builds of the row kernels, end to end: worlds equal the oracle, and all builds give the same bits.

`MOECOMM_ISA=avx2 python tests/dispatch/test_isa.py` runs one build; prints its name and a digest of all results.
"""

import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, check_case, make_case
from decode_steps import check_step
from worlds import bits, random_world

import moecomm
from moecomm._native import core

ROOT = Path(__file__).parents[2]
# Tokens and widths with full vectors, remainders, and partial tiles.
TOKENS, WIDTHS = [7, 0, 12, 3], [16, 144, 1040]


def cases():
    """All dtypes and layouts; all codes and wire formats; random cases."""
    for dtype, layout, hidden in itertools.product(DTYPES, ["expert", "rank"], WIDTHS):
        yield Case(
            ranks_per_node=2,
            tokens=TOKENS,
            layout=layout,
            dtype=dtype,
            hidden=hidden,
            bias="matrix",
            combine_weights="other",
        )
    for coding, wire, hidden in itertools.product(
        [("fp8", "row"), ("fp8_ue8m0", "column")], ["fp8", "logfmt10"], WIDTHS
    ):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield Case(
                ranks_per_node=2,
                tokens=TOKENS,
                dtype=dtype,
                hidden=hidden,
                quant=coding[0],
                scale_layout=coding[1],
                wire=wire,
            )
    for seed in range(8):
        yield make_case(random.Random(seed).choice, 4, 2)


def decode(comm, hidden, dtype):
    """Return the results of decode steps with every encoding."""
    worlds = [random_world(4, [5, 0, 8, 2], hidden, 16, 4, dtype, seed=seed) for seed in range(6)]
    buf = moecomm.Buffer(
        comm,
        hidden=hidden,
        num_experts=16,
        top_k=4,
        max_tokens=8,
        dtype=dtype,
        arena_bytes=1 << 16,
        decode=True,
    )
    for i, world in enumerate(worlds):
        if i == 3:
            buf.backend.memory.decode.native.set_stream_threshold(0)  # use streaming stores for all sizes
        yield check_step(
            comm,
            buf,
            world,
            scheme=[None, "fp8", "fp8_ue8m0"][i % 3],
            wire=[None, "fp8", "logfmt10"][i // 2],
            weights_travel=i % 2 == 1,
        )


def everything(comm):
    """Return the bits of all results on one rank."""
    out = []
    for case in cases():
        out += check_case(comm, case)
    for hidden, dtype in itertools.product(WIDTHS, [torch.bfloat16, torch.float16, torch.float32]):
        out += decode(comm, hidden, dtype)
    return out


def digest():
    """Return a digest of all ranks' bits, including NaN."""
    found = hashlib.sha256()
    for rank in moecomm.run_local(everything, 4, ranks_per_node=2, timeout=60):
        for t in rank:
            found.update(bits(t).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(core.isa(), digest())


@pytest.fixture(scope="module")
def builds():
    """Run each build in a process; return {name: (output, exit status)}."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    running = {
        isa: subprocess.Popen(
            [sys.executable, __file__],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MOECOMM_ISA": isa, "PYTHONPATH": path},
        )
        for isa in ("base", "avx2", "avx512")
    }
    return {isa: (process.communicate(timeout=200), process.returncode) for isa, process in running.items()}


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_equal_bits(builds, isa):
    (expected, trouble), status = builds["base"]
    assert status == 0 and expected.startswith("base "), trouble[-3000:]
    (got, trouble), status = builds[isa]
    if status and f"MOECOMM_ISA is '{isa}'" in trouble:
        pytest.skip(f"{isa}: this machine does not have it")
    assert status == 0, trouble[-3000:]
    assert got == expected.replace("base", isa)
