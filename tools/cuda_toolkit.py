"""What setup.py builds the CUDA world with: the compiler, its headers, for which GPUs; or why there is no CUDA world.

Needs Python alone.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

OLDEST = 12, 4
_NAMES = {"Ampere": "8.0 8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0 12.0"}  # as torch knows them


def nvcc():
    """Path of the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def version(compiler):
    """(major, minor) of a compiler, (0, 0) where it does not say."""
    said = re.search(
        r"release (\d+)\.(\d+)",
        subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout,
    )
    return (int(said[1]), int(said[2])) if said else (0, 0)


def home():
    """Return the folder of the toolkit, which has include/cuda_runtime_api.h, or None."""
    places = [
        Path(os.environ.get("CUDA_HOME", "/nowhere")),
        Path(nvcc() or "/nowhere").resolve().parent.parent,
        Path("/usr/local/cuda"),
    ]
    return next((p for p in places if (p / "include/cuda_runtime_api.h").exists()), None)


def why_not():
    """Return None if the CUDA world can be built, else the reason. MOECOMM_NO_CUDA=1 leaves it out."""
    if os.environ.get("MOECOMM_NO_CUDA"):
        return "MOECOMM_NO_CUDA was set"
    if nvcc() is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME"
    found = version(nvcc())
    if found < OLDEST:
        return (
            f"{nvcc()} is CUDA {found[0]}.{found[1]}, and {OLDEST[0]}.{OLDEST[1]} is the oldest that serves"
        )
    if home() is None:
        return f"{nvcc()} was found, but no include/cuda_runtime_api.h beside it or in CUDA_HOME"
    return None


def architectures(words=None):
    """nvcc's -gencode options for a TORCH_CUDA_ARCH_LIST, whose words are as torch's: 8.0, 9.0, 9.0+PTX,
    Hopper. None: Hopper's, with PTX that newer GPUs compile when they load it (that of 9.0a runs on Hopper alone).

    Raises
    ------
    ValueError
        A word is none of these, or older than 8.0.
    """
    flags = []
    for word in (words or os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0+PTX").replace(";", " ").split():
        name, ptx = word.removesuffix("+PTX"), word.endswith("+PTX")
        for number in _NAMES.get(name, name).split():
            if not re.fullmatch(r"\d+\.\d[af]?", number) or float(number.rstrip("af")) < 8:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST: got {word!r}; expected words like 8.0, 9.0a or 9.0a+PTX, from 8.0 on"
                )
            number = number.replace(".", "")
            flags.append(
                f"-gencode=arch=compute_{number},code=[sm_{number}{f',compute_{number}' if ptx else ''}]"
            )
    return flags
