"""The world from the environment: variables of launchers, hosts, devices, namespaces."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import joining
import pytest
import torch

import moecomm
from moecomm import launch

ENV = {"RANK": "{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "PORT"}


STEP = {
    "SLURM_PROCID": "{rank}",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NUM_NODES": "1",
    "MASTER_PORT": "PORT",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize(
    "environment,initialized,error",
    [
        ({}, True, None),
        (ENV, False, None),
        (ENV, True, None),
        (STEP, False, None),
        (
            {"RANK": "{rank}", "WORLD_SIZE": "2"},
            False,
            "RANK and WORLD_SIZE .* seems to be part of a launched job, but its MASTER_ADDR and "
            "MASTER_PORT are unknown",
        ),
        (
            {**ENV, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
            True,
            r"default group.*rank \d of 2.* and OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE .*rank 0 of "
            r"4.* contradict",
        ),
        (
            {**ENV, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "MOECOMM_GROUP": "torch"},
            True,
            None,
        ),
    ],
    ids=["initialized", "RANK", "both", "srun", "no address", "contradiction", "chosen"],
)
def test_communicator_without_a_group(processes, tmp_path, environment, initialized, error):
    environment = {k: free_port() if v == "PORT" else v for k, v in environment.items()}
    for rank, seen in enumerate(joining.run(processes, tmp_path, 2, joining.found, environment, initialized)):
        if error is None:
            assert seen["error"] is None and seen["world"] == [rank, 2], seen
        else:
            assert (
                seen["error"]["type"] == "InvalidArgument"
                and re.search(error, seen["error"]["text"])
                and "MOECOMM_GROUP" in seen["error"]["text"]
            ), seen


@pytest.mark.parametrize(
    "environment,error",
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        (
            {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
            None,
        ),  # the shell of salloc
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MOECOMM_GROUP": "alone"}, None),
        ({"RANK": "0"}, "RANK .* seems to be part of a launched job"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE .* seems to be part of a launched job"),
        ({"RAY_RAYLET_PID": "1"}, "RAY_RAYLET_PID .* seems to be part of a launched job"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "4"},
            "RANK and WORLD_SIZE .* and OMPI_COMM_WORLD_SIZE .* contradict",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, "contradict"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected a rank below the size"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK is 'zero'"),
        (
            {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
            "SLURM_PROCID .* seems to be part of a launched job",
        ),
        ({"MOECOMM_GROUP": "torch"}, "default group of torch.distributed is not initialized"),
        ({"MOECOMM_GROUP": "slurm"}, "no variable of such a launcher"),
        ({"MOECOMM_GROUP": "all"}, "MOECOMM_GROUP is 'all'"),
    ],
)
def test_alone(monkeypatch, environment, error):
    """Without any launcher there is one rank; never by mistake."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if error is None:
        with moecomm.Communicator() as comm:
            assert comm.size == 1
    else:
        with pytest.raises(moecomm.InvalidArgument, match=error):
            moecomm.Communicator()
    with (
        moecomm.Communicator("alone")
        if environment.get("MOECOMM_GROUP") != "all"
        else contextlib.nullcontext() as comm
    ):
        assert comm is None or comm.size == 1


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("node07", "node07"),
        ("a1,b2", "a1"),
        ("node[07-12,20],other3", "node07"),
        ("n[1,3]-ib", "n1-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes, first):
    assert launch.first_host(nodes) == first


def test_a_mesh_of_devices(tmp_path):
    """A mesh of one dimension is a group; others are refused by name."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        both = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
        with moecomm.Communicator(both["ep"]) as comm:
            assert comm.size == 1
        with pytest.raises(moecomm.InvalidArgument, match=r"DeviceMesh of 2 dimensions \('dp', 'ep'\)"):
            moecomm.Communicator(both)
        with pytest.raises(moecomm.InvalidArgument, match="NON_GROUP_MEMBER"):
            moecomm.Communicator(dist.GroupMember.NON_GROUP_MEMBER)
    finally:
        dist.destroy_process_group()


def test_two_pid_namespaces(tmp_path):
    """PIDs of one namespace are invalid in the other, so these ranks are two nodes.

    If they were treated as one node, the nonce of the window would reveal it.
    """
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        possible = subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("pid namespaces: not permitted here")
    code = "import sys; sys.path.insert(0, 'tests/support'); import joining; joining.apart(*sys.argv[1:])"
    ranks = [
        subprocess.Popen(
            [*unshare, sys.executable, "-c", code, str(tmp_path), str(r)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    for p in ranks:
        output = p.communicate(timeout=100)[0]
        assert p.returncode == 0, output
    for r in range(2):
        seen = json.loads((tmp_path / f"{r}.json").read_text())
        assert seen["as it is"] is None and seen["nodes"] == [2, 1] and seen["rows"] == [0.0, 1.0], seen
        assert seen["mistaken"] is not None and "pid namespace" in seen["mistaken"]["text"], seen
