"""The testable claims of SECURITY.md: open ports, and access to memory."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()

RANK = """
import json, os, sys
import torch, torch.distributed as dist
from datetime import timedelta

def listening():
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    lines = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/self/net/{name}").readlines()[1:]]
    return sorted(f[1] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in inodes)

import moecomm
rank, folder, per_node = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store, timeout = f"file://{folder}/store", timedelta(seconds=120)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
before = listening()
comm = moecomm.Communicator(dist.group.WORLD, ranks_per_node=per_node, timeout=60)
buf = moecomm.Buffer(comm, hidden=64, num_experts=4, top_k=2, max_tokens=8)
out = buf.dispatch(torch.zeros((8, 64), dtype=torch.bfloat16), torch.tensor([[0, 2]] * 8, dtype=torch.int64))
buf.combine(out.handle.rows, out.handle)
named = [line for line in open("/proc/self/maps") if "/SYSV" in line or "/dev/shm" in line]
maps = sorted({line.split(None, 5)[-1].strip() for line in named})
memfds = [
    fd for fd in os.listdir("/proc/self/fd")
    if os.path.exists(f"/proc/self/fd/{fd}") and "memfd:moecomm" in os.readlink(f"/proc/self/fd/{fd}")
]
mine, stranger = os.getpid(), None
if os.geteuid() == 0 and memfds:   # act as another user of this host
    read, write = os.pipe()
    if os.fork() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            os.open(f"/proc/{mine}/fd/{memfds[0]}", os.O_RDWR)
            os.write(write, b"opened")
        except OSError as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.close(write)
    stranger = os.read(read, 100).decode()
ports, closed = [a for a in listening() if a not in before], oct(os.stat("/proc/self/fd").st_mode & 0o077)
print(json.dumps(dict(ports=ports, maps=maps, memfds=len(memfds), rail=comm.rail, stranger=stranger,
                      closed=closed)), flush=True)
comm.barrier()
buf.close()
comm.close()
"""


def world(tmp_path, per_node, **env):
    """Return the reports of two ranks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")} | {
        "PYTHONPATH": str(ROOT),
        **env,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(r), str(tmp_path), str(per_node)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for r in range(2)
    ]
    said = [p.communicate(timeout=180) for p in ranks]
    assert all(p.returncode == 0 for p in ranks), said
    return [json.loads(out) for out, _ in said]


def addresses(ports):
    """Convert hexadecimal addresses of /proc/net/tcp to dotted ones."""
    return [
        socket.inet_ntoa(struct.pack("<I", int(port.partition(":")[0], 16)))
        for port in ports
        if len(port) < 20
    ]


def test_one_node(tmp_path):
    """There is no TCP port, and another user cannot open the windows."""
    for rank in world(tmp_path, 2):
        assert rank["ports"] == [] and rank["rail"] == "none" and rank["memfds"] >= 1
        assert rank["closed"] == "0o0" and rank["stranger"] in (None, "PermissionError")


def test_two_nodes_on_the_loopback(tmp_path):
    """UCX_NET_DEVICES limits the interfaces on which UCX listens; UCX_TLS limits the segments."""
    for rank in world(tmp_path, 1, UCX_NET_DEVICES="lo", UCX_TLS="^sysv,posix"):
        assert (
            rank["rail"] == "ucx"
            and set(addresses(rank["ports"])) == {"127.0.0.1"}
            and len(rank["ports"]) == len(addresses(rank["ports"]))
        )
        assert rank["maps"] == [] and rank["closed"] == "0o0"


def test_two_nodes_as_they_come(tmp_path):
    """One port per interface, never the wildcard address, as documented."""
    for rank in world(tmp_path, 1):
        found = addresses(rank["ports"])
        assert "127.0.0.1" in found and "0.0.0.0" not in found and len(found) == len(set(found))


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:tests|moecomm)/[\w/.]+)`", TEXT) + re.findall(r"\]\(([\w/.]+)\)", TEXT)
)
def test_what_it_points_to_is_there(path):
    assert (ROOT / path).is_file()


def test_readme_points_to_it():
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
