"""Programs of torch.export in two processes: run by tests/nn/test_export.py.

python export_worker.py save FILE      a compiled layer's program, its input and its output
python export_worker.py load FILE      the same in a process in which other Buffers were made first: prints the
                                       largest difference
"""

import sys

import torch

import moecomm
from moecomm.nn import MoE

TOKENS, HIDDEN, EXPERTS, TOP_K = 5, 32, 8, 2


def buffer_of(comm, **options):
    """A Buffer; options: what is different from that of the layer."""
    shape = dict(hidden=HIDDEN, num_experts=EXPERTS, top_k=TOP_K, max_tokens=16, dtype=torch.float32)
    return moecomm.Buffer(comm, **shape | options)


def save(file, strict):
    comm = moecomm.Communicator("alone")
    torch.manual_seed(0)
    layer, x = MoE(HIDDEN, 16, EXPERTS, TOP_K, 1, buffer_of(comm), capacity=64), torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=strict)
        torch.export.save(program, file)
        torch.save((x, layer(x)), file + ".values")
    names = {
        a for n in program.graph.nodes if "moecomm" in str(n.target) for a in n.args if isinstance(a, str)
    }
    print(sorted(names))


def load(file):
    comm = moecomm.Communicator("alone")
    others = [buffer_of(comm, hidden=64), buffer_of(comm, num_experts=16)]
    program, (x, want) = torch.export.load(file).module(), torch.load(file + ".values")
    with torch.no_grad():
        try:
            program(x)
        except moecomm.InvalidArgument as error:
            print("none:", error)
        own = buffer_of(comm, max_tokens=8)
        print("difference", float((program(x) - want).abs().max()))
        print("calls", own.stats()["calls"], *(other.stats()["calls"] for other in others))
        twin = buffer_of(moecomm.Communicator("alone"))
        try:
            program(x)
        except moecomm.InvalidArgument as error:
            print("two:", error)
        twin.close()
        print("difference", float((program(x) - want).abs().max()))


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(sys.argv[2], sys.argv[3] == "strict")
    else:
        load(sys.argv[2])
