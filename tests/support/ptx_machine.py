"""Single PTX kernels on the machine of tools/ptx, for tests of its operations."""

import ctypes
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from ptx import build
from ptx.assembler import assemble
from ptx.parser import parse

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n.extern .shared .align 128 .b8 stage[];\n"
REGISTERS = """.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<20>;
.reg .f32 %f<20>;
.reg .f64 %fd<20>;
.reg .b64 %rd<20>;
"""


@functools.cache
def library():
    """Return the library, which is built and loaded once per process."""
    found = ctypes.CDLL(str(build.machine()))
    found.ptx_run.restype = found.ptx_operations.restype = ctypes.c_char_p
    return found


def kernel(name, body, parameters=2):
    """Make a kernel of pointers in %rd0 and up; %r0 is the thread's index in the grid."""
    heads = ",\n".join(f".param .u64 {name}_param_{k}" for k in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{k}, [{name}_param_{k}];\n" for k in range(parameters))
    return (
        f".visible .entry {name}(\n{heads}\n)\n{{\n{REGISTERS}{loads}"
        "mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\n"
        f"mad.lo.u32 %r0, %r1, %r2, %r0;\n{body}\nret;\n}}\n"
    )


def write(path, *kernels):
    """Translate a module."""
    path.write_text(assemble(parse(HEAD + "".join(kernels))))
    return path


def run(path, name, tensors, blocks=1, threads=32, shared=4096, seed=0, check=False):
    """Run a kernel on CPU tensors; return the error or None. With `check`, also check the order of memory."""
    count = len(tensors)
    pointers = (ctypes.c_uint64 * count)(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_uint64 * count)(*(t.numel() * t.element_size() for t in tensors))
    library().ptx_settings(ctypes.c_uint64(seed), 132)
    library().ptx_check(check)
    said = library().ptx_run(
        str(path).encode(), name.encode(), blocks, threads, ctypes.c_uint64(shared), count, pointers, sizes
    )
    library().ptx_check(False)
    return None if said is None else said.decode()
