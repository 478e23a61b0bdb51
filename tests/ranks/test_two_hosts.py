"""Two hosts: network namespaces connected by a veth pair, with four ranks each and UCX/tcp between them."""

import json
import multiprocessing
import os
import subprocess
import time

import hosts
import pytest

SIZE = 8


def ip(*arguments, check=True):
    """Run `ip`; return its CompletedProcess."""
    return subprocess.run(["ip", *map(str, arguments)], check=check, capture_output=True, text=True)


@pytest.fixture
def namespaces():
    """Make two namespaces, each with a link called `wire`."""
    names = [f"moecomm-{os.getpid()}-{side}" for side in "ab"]
    try:
        first = ip("netns", "add", names[0], check=False)
    except FileNotFoundError:
        pytest.skip("network namespaces: no `ip` command here")
    if first.returncode:
        pytest.skip(f"network namespaces are not permitted here: {first.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        made = ip(
            "link",
            "add",
            "wire",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            names[1],
            check=False,
        )
        if made.returncode:
            pytest.skip(f"veth pairs are not permitted here: {made.stderr.strip()}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        deadline = time.monotonic() + 5
        while (
            any("state UP" not in ip("-n", name, "link", "show", "wire").stdout for name in names)
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)  # UCX looks for a route when it starts, and the kernel detects the carrier late
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def run(processes, folder, namespaces, *, cut):
    """Return the observations of all ranks."""
    ranks = [
        processes.Process(target=hosts.main, args=(str(folder), namespaces[r * 2 // SIZE], r, SIZE, cut))
        for r in range(SIZE)
    ]
    for p in ranks:
        p.start()
    try:
        deadline = time.monotonic() + 90
        while cut and not (folder / "armed").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if cut:
            time.sleep(0.1)
            ip("-n", namespaces[1], "link", "set", "wire", "down")
        for r, p in enumerate(ranks):
            p.join(max(0, deadline - time.monotonic()))
            assert p.exitcode == 0, f"rank {r} ended with {p.exitcode} (None: it hangs)"
    finally:
        for p in ranks:
            p.kill()
            p.join()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(SIZE)]


def test_dispatch_between_hosts(processes, tmp_path, namespaces):
    seen = run(processes, tmp_path, namespaces, cut=False)
    assert all(s["nodes"] == [2, 4, "ucx"] for s in seen), "the hosts were not told apart"


def test_a_closed_link(processes, tmp_path, namespaces):
    for rank, s in enumerate(run(processes, tmp_path, namespaces, cut=True)):
        e = s["error"]
        where = f"rank {rank}: {s}"
        assert (
            e["type"] in ("PeerTimeout", "PeerLost")
            and e["op"] == "dispatch"
            and e["rank"] == rank
            and e["phase"] != "none"
        ), where
        assert s["seconds"] < 5.0 + 2 and s["close_seconds"] < 2, where
        assert e["expected"] is not None and e["got"] is not None, where
    assert multiprocessing.active_children() == []
