"""The structure of the Python package: no import circles, few private members read across objects."""

import ast
from pathlib import Path

import moecomm

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moecomm"
PATHS = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}


def only_for_types(node):
    """Whether it is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_that_run(tree):
    """The tree's nodes, those in functions included, without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if only_for_types(node):
            for other in node.orelse:
                yield other
                yield from nodes_that_run(other)
            continue
        yield node
        yield from nodes_that_run(node)


def imports(name, source, known, is_package=False):
    """Modules of `known` that the source of a module imports, on top or inside functions."""
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
            # The packages around a module run before it; those around the importing module have begun already.
            parts = other.split(".")
            around = (".".join(parts[:n]) for n in range(1, len(parts)))
            yield from (p for p in around if p in known and not f"{name}.".startswith(f"{p}."))
            if other in known and other != name:
                yield other


def circles(graph):
    """Groups of modules of which each reaches every other."""

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
    """On top, inside a function, through the package around a module, and not where only type checkers look."""
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


def private_reads(source):
    """Lines and texts where a private member of anything but self and cls is read or set."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                text = ast.unparse(node)
                if not text.startswith("torch."):
                    yield node.lineno, text


# Private members read across objects in the whole package; the number may only shrink.
ACROSS = 212


def test_the_search_finds_private_reads():
    source = "def f(self, other):\n    return self._a + other._b + self.c._d + self._e._f + other.__class__"
    assert sorted(text for _, text in private_reads(source)) == ["other._b", "self._e._f", "self.c._d"]


def test_private_members_stay_private():
    found = {name: list(private_reads(path.read_text())) for name, path in PATHS.items()}
    total = sum(map(len, found.values()))
    most = {name: len(reads) for name, reads in sorted(found.items()) if reads}
    assert total <= ACROSS, f"{total} private members are read across objects, by module {most}"
    assert total == ACROSS, f"write {total} in ACROSS: it has shrunk"


def test_migrate_is_a_function_and_a_method():
    assert moecomm.balance.migrate.__module__ == "moecomm.balance.migration"
    assert moecomm.balance.Placement.migrate.__doc__
