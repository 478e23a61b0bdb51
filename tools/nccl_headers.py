"""Where NCCL's headers lie, for the kernels whose rail is NCCL's network. Needs Python alone: setup.py asks too.

As a program: prints the folder; exit status 1 if there is none.
"""

import os
import re
import site
import sys
import sysconfig
from pathlib import Path

OLDEST = 23200  # requests with a deadline, a choice of network


def version(include):
    """NCCL_VERSION_CODE of the headers in a folder; 0 where they are not, or have no device part."""
    header = Path(include) / "nccl.h"
    if not header.exists() or not (Path(include) / "nccl_device.h").exists():
        return 0
    return int(re.search(r"define NCCL_VERSION_CODE (\d+)", header.read_text())[1])


def places():
    """Where headers are looked for: NCCL_HOME, CUDA_HOME, and NCCL's wheel (nvidia-nccl-cu13, -cu12) in
    this environment. A build that pip isolates has an environment of its own, so also in that of this
    interpreter and in the one that is active."""
    named = [Path(os.environ[name]) / "include" for name in ("NCCL_HOME", "CUDA_HOME") if name in os.environ]
    folders = [
        *sys.path,
        *(sysconfig.get_path(kind) for kind in ("purelib", "platlib")),
        site.getusersitepackages(),
    ]
    if "VIRTUAL_ENV" in os.environ:
        folders.append(
            f"{os.environ['VIRTUAL_ENV']}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        )
    return list(dict.fromkeys([*named, *(Path(folder) / "nvidia/nccl/include" for folder in folders)]))


def find():
    """The folder of headers that are new enough, or None."""
    return next((p for p in places() if version(p) >= OLDEST), None)


def why_not():
    """Why there is none."""
    old = [f"{p} has {version(p)}" for p in places() if version(p)]
    return (
        f"NCCL headers of version {OLDEST} or newer were not found ({'; '.join(old) or 'none at all'}): "
        "pip install nvidia-nccl-cu13, or set NCCL_HOME, and build again"
    )


if __name__ == "__main__":
    print(find() or "not found")
    sys.exit(find() is None)
