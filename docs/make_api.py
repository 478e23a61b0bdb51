"""Writes docs/api.md from the docstrings; `--check` fails where it misses a public name, or that has no docstring.

Read from the sources, not imported: modules that need another library are documented all the same.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moecomm"
TARGET = Path(__file__).parent / "api.md"
# Modules without names for users, and (by what they define) commands of `python -m moecomm`.
INTERNAL = {
    "archives",
    "arguments",
    "bootstrap",
    "calls",
    "checks",
    "cuda",
    "cuda_decode",
    "grouped",
    "options",
    "record_check",
    "record_files",
    "record_format",
    "recorder",
    "shapes",
    "shared",
}
MIXINS = {"Calls": "calls", "DecodeVerbs": "decode"}  # documented as members of the class that inherits them
COMMAND = {"arguments", "main"}


class Missing(Exception):
    """Public names without a docstring."""


def exported():
    """moecomm.__all__, and the module that each name comes from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    origin = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            origin.update({alias.asname or alias.name: node.module or alias.name for alias in node.names})
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    return {name: origin[name] for name in names}


def modules():
    """Dotted name (without the package) and syntax tree of every public module, by name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if (
            name
            and not any(part.startswith("_") for part in parts if part != "__init__")
            and name.split(".")[0] not in INTERNAL
        ):
            yield name, ast.parse(path.read_text())


def public(tree):
    """Top-level classes and functions whose names have no underscore."""
    return [
        node
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
        and node.name not in MIXINS
    ]


def constants(tree):
    """`- name: what it is` for module-level objects made by a call of a class, and for operators with their schema."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.targets[0], ast.Name)
        ):
            name, call = node.targets[0].id, node.value
            if name.startswith("_"):
                continue
            if ast.unparse(call.func) == "_define":
                yield f"- `{name}{ast.literal_eval(call.args[-1])}`"
            elif ast.unparse(call.func)[0].isupper():
                yield f"- `{name}`: `{ast.unparse(call)}`"


def body_of(node):
    """What a class defines, and then what its mixins do."""
    yield from node.body
    for base in filter(MIXINS.get, map(ast.unparse, node.bases)):
        tree = ast.parse((PACKAGE / f"{MIXINS[base]}.py").read_text())
        yield from next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == base).body


def members(node):
    """(kind, node) of a class's public methods and properties, in their order."""
    for item in body_of(node):
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            decorators = {ast.unparse(d) for d in item.decorator_list}
            if not any(d.endswith(".setter") for d in decorators):
                yield "property" if decorators & {"property", "cached_property"} else "method", item


def signature(node):
    """`name(arguments)` of a function, a method (without self) or a class."""
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if init is not None:
            return f"{node.name}({arguments(init)})"
        fields = [
            f"{ast.unparse(f.target)}" + (f"={ast.unparse(f.value)}" if f.value else "")
            for f in node.body
            if isinstance(f, ast.AnnAssign)
        ]
        return f"{node.name}({', '.join(fields)})" if fields else node.name
    return f"{node.name}({arguments(node)})"


def arguments(function):
    """The arguments as they are written, without annotations and self."""
    args = ast.parse(f"def f({ast.unparse(function.args)}): pass").body[0].args
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    if args.args and args.args[0].arg in ("self", "cls"):
        args.args.pop(0)
    return ast.unparse(args)


def text_of(node, where, missing):
    """The docstring as Markdown; a missing one is noted."""
    doc = ast.get_docstring(node)
    if not doc:
        missing.append(where)
        return ""
    lines, out, section = doc.splitlines(), [], None
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1].strip()) and line.strip():
            section = line.strip()
            out += ["", f"**{section}**", ""]
        elif re.fullmatch(r"-{3,}", line.strip()):
            continue
        elif section and line and not line[0].isspace() and line.startswith(("Source:", "See ")):
            section = None
            out += ["", line]
        elif section and line and not line[0].isspace():
            name, colon, kind = line.partition(" : ")
            out.append(f"- `{name}`" + (f": {kind}" if colon else ""))
        elif section and line:
            out.append("  " + line.strip())
        else:
            out.append(line)
    return "\n".join(out).strip()


def class_text(node, where, level, missing):
    """A class with its members."""
    parts = [f"{'#' * level} `{signature(node)}`", text_of(node, where, missing)]
    for kind, item in members(node):
        name = item.name if kind == "property" else signature(item)
        parts += [f"{'#' * (level + 1)} `{node.name}.{name}`", text_of(item, f"{where}.{item.name}", missing)]
    return parts


def render():
    """The whole document.

    Raises
    ------
    Missing
        A public name has no docstring.
    """
    names, missing = exported(), []
    trees = dict(modules())
    parts = [
        "# API",
        "Made from the docstrings by `python docs/make_api.py`. Shapes are in brackets: T tokens of a rank, N received rows, E experts.",
    ]
    parts += ["## moecomm"]
    homes = set()
    for name, home in names.items():
        node = next((n for n in public(trees.get(home, ast.Module([], []))) if n.name == name), None)
        if node is not None:
            homes.add(home)
            parts += (
                class_text(node, f"moecomm.{name}", 3, missing)
                if isinstance(node, ast.ClassDef)
                else [f"### `{signature(node)}`", text_of(node, f"moecomm.{name}", missing)]
            )
    for name, tree in trees.items():
        shown = [
            node
            for node in public(tree)
            if node.name not in names and not (name in homes and isinstance(node, ast.FunctionDef))
        ]
        objects = "\n".join(constants(tree))
        if not shown and not objects or COMMAND <= {node.name for node in shown}:
            continue
        parts += [f"## moecomm.{name}", text_of(tree, f"moecomm.{name}", missing), objects]
        for node in shown:
            where = f"moecomm.{name}.{node.name}"
            parts += (
                class_text(node, where, 3, missing)
                if isinstance(node, ast.ClassDef)
                else [f"### `{signature(node)}`", text_of(node, where, missing)]
            )
    if missing:
        raise Missing("no docstring: " + ", ".join(missing))
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(part for part in parts if part)) + "\n"


def headings(text):
    """The names that a document has headings for, by module."""
    found, module = set(), ""
    for line in text.splitlines():
        if line.startswith("## "):
            module = line[3:]
        elif match := re.match(r"#{3,} `([\w.]+)", line):
            found.add(f"{module}.{match[1]}")
    return found


def main():
    """Write docs/api.md, or check its names; returns the exit status."""
    try:
        text = render()
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif absent := headings(text) ^ headings(TARGET.read_text() if TARGET.exists() else ""):
        print(
            f"docs/api.md is out of date: run python docs/make_api.py; it lacks, or has needlessly: {', '.join(sorted(absent))}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
