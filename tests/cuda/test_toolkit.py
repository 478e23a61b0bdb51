"""The setup of the CUDA build: compiler, GPU architectures, NCCL's headers, and the later report of these."""

import os
import stat
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402 - beside setup.py
import nccl_headers  # noqa: E402

from moecomm import __main__ as command  # noqa: E402
from moecomm import cuda, info, nccl  # noqa: E402


@pytest.mark.parametrize(
    "words,flags",
    [
        ("9.0a+PTX", ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]),
        ("8.0 9.0a", ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90a,code=[sm_90a]"]),
        (
            "8.0;9.0+PTX",
            ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
        ),
        (
            "Ampere;Hopper+PTX",
            [
                *(f"-gencode=arch=compute_{n},code=[sm_{n}]" for n in (80, 86)),
                "-gencode=arch=compute_90,code=[sm_90,compute_90]",
            ],
        ),
        (
            "10.0a 12.0",
            ["-gencode=arch=compute_100a,code=[sm_100a]", "-gencode=arch=compute_120,code=[sm_120]"],
        ),
    ],
)
def test_architectures(words, flags, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", words)
    assert cuda_toolkit.architectures() == flags


@pytest.mark.parametrize("unset", [None, ""])
def test_hopper_with_ptx_by_default(unset, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if unset is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", unset)
    assert cuda_toolkit.architectures() == ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]


@pytest.mark.parametrize("word", ["7.0", "Volta", "sm_90", "9", "9.0x"])
def test_words_that_are_no_architectures(word):
    with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST: got '{word}'; expected words like"):
        cuda_toolkit.architectures(word)


def toolkit(folder, release, headers=True):
    """Make a CUDA_HOME with a compiler of this release."""
    (folder / "bin").mkdir(parents=True)
    compiler = folder / "bin/nvcc"
    compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    if headers:
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime_api.h").touch()
    return folder


@pytest.mark.parametrize(
    "release,expected",
    [
        ("12.4", None),
        ("13.0", None),
        ("12.10", None),
        ("12.3", "is CUDA 12.3, and 12.4 is the oldest"),
        ("11.8", "is CUDA 11.8"),
    ],
)
def test_the_compiler_s_version(release, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, release)))
    monkeypatch.delenv("MOECOMM_NO_CUDA", raising=False)
    said = cuda_toolkit.why_not()
    assert said is None if expected is None else expected in said
    assert cuda_toolkit.home() == tmp_path


def test_why_there_is_no_toolkit(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("MOECOMM_NO_CUDA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_toolkit.why_not() == "nvcc was found neither on PATH nor in CUDA_HOME"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "new", "13.0")))
    monkeypatch.setenv("MOECOMM_NO_CUDA", "1")
    assert cuda_toolkit.why_not() == "MOECOMM_NO_CUDA was set"


def nccl_folder(root, version, device=True):
    """Make headers in the layout of NCCL's wheel, in a folder of packages."""
    include = root / "nvidia/nccl/include"
    include.mkdir(parents=True)
    (include / "nccl.h").write_text(f"#define NCCL_VERSION_CODE {version}\n")
    if device:
        (include / "nccl_device.h").touch()
    return include


@pytest.mark.parametrize("where", ["path", "environment", "active", "home"])
def test_where_nccl_s_headers_are_found(where, tmp_path, monkeypatch):
    """Also in an isolated build of pip, whose sys.path lacks the calling environment."""
    packages = tmp_path / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    include = nccl_folder(packages, nccl_headers.OLDEST)
    monkeypatch.setattr(sys, "path", [str(packages)] if where == "path" else ["/isolated"])
    monkeypatch.setattr(
        sysconfig, "get_path", lambda kind: str(packages) if where == "environment" else "/nowhere"
    )
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path if where == "active" else "/nowhere"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("NCCL_HOME", raising=False)
    if where == "home":
        monkeypatch.setenv("NCCL_HOME", str(include.parent))
    assert nccl_headers.find() == include


def test_why_there_are_no_headers(tmp_path, monkeypatch):
    found = [
        tmp_path / "none",
        nccl_folder(tmp_path / "old", 22907),
        nccl_folder(tmp_path / "no device", 23203, device=False),
    ]
    monkeypatch.setattr(nccl_headers, "places", lambda: found)
    assert nccl_headers.find() is None
    assert (
        "("
        + str(tmp_path / "old/nvidia/nccl/include")
        + " has 22907): pip install nvidia-nccl-cu13, or set NCCL_HOME, and build again"
        in nccl_headers.why_not()
    )


def test_info_says_what_was_left_out_and_why(monkeypatch, capsys):
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        cuda,
        "built",
        lambda: {
            "no_cuda": "nvcc was found neither on PATH nor in CUDA_HOME",
            "no_nccl": "NCCL headers were not found",
        },
    )
    monkeypatch.setattr(nccl, "find", lambda: nccl.Library("/lib/libnccl.so.2", 23203, False))
    assert info.main(None) in (None, 0)
    said = capsys.readouterr().out
    assert (
        "world cuda  no   this build has no CUDA extension (nvcc was found neither on PATH nor in CUDA_HOME); "
        "set CUDA_HOME" in said
    )
    assert (
        "nodes with GPUs  NCCL 2.32.3, of its wheel: not in this build: NCCL headers were not found" in said
    )


def test_this_build_says_what_it_has():
    assert set(cuda.built()) <= {"no_cuda", "no_nccl"}
    assert command.main(["info"]) in (None, 0)
    assert (cuda.built().get("no_cuda") is None) == (
        Path(os.path.dirname(cuda.core.__file__))
        .joinpath("cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
        .exists()
    )
