"""How much memory Buffers commit before the first call: what one may need, not what all may need together."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import re
    import moecomm

    def committed():  # KiB of windows that this process has committed
        maps, window, total = open("/proc/self/smaps").read().splitlines(), False, 0
        for line in maps:
            if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
                window = "memfd:" in line
            elif window and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    comm = moecomm.Communicator()
    shape = dict(hidden=7168, num_experts=16, top_k=8, max_tokens=256)
    sizes, layers = [committed()], []
    for _ in range(6):
        layers.append(moecomm.Buffer(comm, **shape))
        sizes.append(committed())
    for layer in layers:
        layer.close()
    layers.clear()
    sizes.append(committed())
    layers.append(moecomm.Buffer(comm, **shape))
    sizes.append(committed())
    print(*sizes)
"""


@pytest.fixture(scope="module")
def sizes():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [int(n) >> 10 for n in done.stdout.split()]


def test_the_first_buffer_is_populated(sizes):
    """4 x 256 tokens x 8 picks x 14 KiB: the rows of two dispatches and the output of their experts."""
    assert sizes[1] - sizes[0] >= 110


def test_a_buffer_per_layer_does_not_commit_the_memory_of_all_layers(sizes):
    """The limit is 256 MiB for all: two Buffers of 112 MiB, a part of the third, and then nothing."""
    assert sizes[6] - sizes[0] < 256 + 6 * 8, sizes
    assert sizes[6] - sizes[5] < 8, sizes


def test_closed_buffers_give_their_share_back(sizes):
    assert sizes[7] - sizes[0] < 8 and sizes[8] - sizes[7] >= 110, sizes
