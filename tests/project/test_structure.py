"""The structure of the Python package: no import cycles, no private members used by other objects."""

import ast
import sys
import threading
from pathlib import Path

import pytest
import torch

import moecomm

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moecomm"
PATHS = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def only_for_types(node):
    """Tell whether a node is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_that_run(tree):
    """Return the nodes of the tree, including those in functions, without code for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if only_for_types(node):
            for other in node.orelse:
                yield other
                yield from nodes_that_run(other)
            continue
        yield node
        yield from nodes_that_run(node)


def imports(name, source, known, is_package=False):
    """Return the modules of `known` that a module imports, at its top or inside functions."""
    package = name if is_package else name.rpartition(".")[0]
    for node in nodes_that_run(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found = [inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        for other in found:
            # Packages around a module are imported before it; those around the importing module already exist.
            parts = other.split(".")
            around = (".".join(parts[:n]) for n in range(1, len(parts)))
            yield from (p for p in around if p in known and not f"{name}.".startswith(f"{p}."))
            if other in known and other != name:
                yield other


def circles(graph):
    """Return groups of modules that all reach each other."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()]:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reach = {name: reached(name) for name in graph}
    return sorted({tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]})


def test_the_search_finds_circles():
    """At the top, inside a function, through a parent package, but not for type checkers only."""
    sources = {
        "m.a": "from . import b",
        "m.b": "def f():\n    from .c import g",
        "m.c": "import m.a",
        "m.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import e",
        "m.e": "from . import d",
        "m.p": "from m import f",
        "m.p.g": "",
        "m.f": "from .p.g import h",
    }
    graph = {name: set(imports(name, source, sources, name == "m.p")) for name, source in sources.items()}
    assert circles(graph) == [("m.a", "m.b", "m.c"), ("m.f", "m.p")]


def test_no_import_circles():
    graph = {
        name: set(imports(name, path.read_text(), PATHS, path.name == "__init__.py"))
        for name, path in PATHS.items()
    }
    assert sum(map(len, graph.values())) > 100, "the search found too little"
    assert circles(graph) == []


# Documented members of other libraries whose names begin with an underscore.
FOREIGN = {
    "_fields": "collections.namedtuple",
    "_exit": "os",
    "_apply": "torch.nn.Module, which subclasses may override",
    "_load_from_state_dict": "torch.nn.Module, the same",
    "_ignored_params": "torch.distributed.fsdp",
    "_current_level": "torch.autograd.forward_ad; torch has no public name for it",
}


def private_reads(source):
    """Return lines that read or set a private member of an object other than self and cls, or read it by vars()."""
    for node in ast.walk(ast.parse(source)):
        owner = None
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("vars("):
            owner, name = node.value.args[0], str(getattr(node.slice, "value", ""))
        if owner is None or not name.startswith("_") or name in FOREIGN:
            continue
        text = ast.unparse(node)
        if ast.unparse(owner) not in ("self", "cls", "super()") and not text.startswith("torch."):
            yield node.lineno, text


def test_the_search_finds_private_reads():
    source = (
        "def f(self, other):\n"
        "    super()._g()\n"
        "    return self._a + other._b + self.c._d + self._e._f + vars(other)['_h'] + other.__class__"
    )
    found = sorted(text for _, text in private_reads(source))
    assert found == ["other._b", "self._e._f", "self.c._d", "vars(other)['_h']"]


def test_private_members_stay_private():
    """No module uses a private member of another object."""
    found = {name: list(private_reads(path.read_text())) for name, path in PATHS.items()}
    assert {name: reads for name, reads in found.items() if reads} == {}


PARTS = (
    "arguments",
    "backend",
    "building",
    "call_order",
    "calls",
    "collective",
    "combining",
    "decode",
    "dispatching",
    "hooks",
    "making",
    "memory",
    "refusals",
    "elastic.renewed",
)


def test_parts_do_not_know_the_buffer():
    """Buffer consists of parts and has none of their methods; no module of a part imports it, even for types."""
    assert moecomm.Buffer.__mro__[1:] == (moecomm.shared.Shared, object)
    for name in PARTS:
        source = PATHS[f"moecomm.{name}"].read_text()
        found = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.level and node.module == "buffer"
        ]
        assert not found, name


@pytest.mark.parametrize("call", [{}, {"capacity": 4}, {"async_op": True}, {"x_grad": True}])
def test_a_dispatch_enters_buffer_py_once(call):
    """After the first step of a call, its code is in the parts, which do not call buffer.py."""
    file = str(PATHS["moecomm.buffer"])
    entered = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == file:
            entered.append(frame.f_code.co_name)

    def main(comm):
        buf = moecomm.Buffer(comm, hidden=16, num_experts=2, top_k=1, max_tokens=4)
        x = torch.ones((2, 16), dtype=torch.bfloat16, requires_grad=call.get("x_grad", False))
        ids = torch.zeros((2, 1), dtype=torch.int64)
        options = {name: value for name, value in call.items() if name != "x_grad"}
        sys.setprofile(note)
        threading.setprofile(note)
        try:
            out = buf.dispatch(x, ids, **options)
            out = out.wait() if call.get("async_op") else out
            rows = out.x.shape[0]
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        return rows

    assert moecomm.run_local(main, 1) == [call.get("capacity", 2)]
    assert entered == ["dispatch"]


def test_migrate_is_a_function_and_a_method():
    assert moecomm.balance.migrate.__module__ == "moecomm.balance.migration"
    assert moecomm.balance.Placement.migrate.__doc__
