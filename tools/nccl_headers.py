"""Where NCCL's headers lie, for the kernels whose rail is NCCL's network. Needs Python alone: setup.py asks too.

As a program: prints the folder; exit status 1 where there is none.
"""

import os
import re
import sys
from pathlib import Path

OLDEST = 23200   # requests with a deadline, a choice of network


def version(include):
    """NCCL_VERSION_CODE of the headers in a folder; 0 where they are not, or have no device part."""
    header = Path(include) / "nccl.h"
    if not header.exists() or not (Path(include) / "nccl_device.h").exists():
        return 0
    return int(re.search(r"define NCCL_VERSION_CODE (\d+)", header.read_text())[1])


def find():
    """The folder of headers that are new enough, or None: in NCCL_HOME, CUDA_HOME, or NCCL's wheel (nvidia-nccl-cu13, -cu12)."""
    places = [Path(os.environ[name]) / "include" for name in ("NCCL_HOME", "CUDA_HOME") if name in os.environ]
    places += [Path(folder) / "nvidia/nccl/include" for folder in sys.path]
    return next((p for p in places if version(p) >= OLDEST), None)


if __name__ == "__main__":
    print(find() or "not found")
    sys.exit(find() is None)
