"""Writes the generated pages: docs/api/*.md from the docstrings, docs/environment.md from moecomm/env.py.

`python docs/make_api.py` writes them. `--check` writes nothing; it fails where a page is out of date or a public name
has no docstring. The sources are read, not imported, so modules that need another library are documented too.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
from api_topics import HIDDEN, TOPICS  # noqa: E402

PACKAGE = DOCS.parent / "moecomm"


class Missing(Exception):
    """Public names without a docstring."""


DECODE_VERBS = "decode_"  # members of Buffer that are on the decode page


def aliases():
    """{public path: where the module lies}, both without the package's name."""
    tree = ast.parse((PACKAGE / "_aliases.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ALIASES"
    )


ALIASES = aliases()
PUBLIC_PATHS = {place: path for path, place in ALIASES.items()}


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
    """{dotted name without the package: syntax tree} of every module without an underscore, shortest names first."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not any(part.startswith("_") for part in parts if part != "__init__"):
            found[PUBLIC_PATHS.get(name, name)] = ast.parse(path.read_text())
    return dict(sorted(found.items(), key=lambda item: (item[0].count("."), item[0])))


def page_of(module):
    """The page of a module, by the first or the last part of its name; None where it is not for users."""
    parts = module.split(".")
    for part in (parts[0], parts[-1]):
        for page, (_, _, _, mine) in TOPICS.items():
            if part in mine:
                return page
    return None


def public(tree):
    """Top-level classes and functions whose names have no underscore."""
    return [
        node
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
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


def origins(tree, module):
    """{name: (module it comes from, its name there)} of what a module imports from this package."""
    package = module if is_package(module) else module.rpartition(".")[0]
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            up = package.split(".") if package else []
            up = up[: len(up) - node.level + 1]
            home = ".".join([*up, *(node.module or "").split(".")]).strip(".")
            found.update({alias.asname or alias.name: (home, alias.name) for alias in node.names})
    return found


def is_package(module):
    """Whether a module is a folder."""
    return (PACKAGE / ALIASES.get(module, module).replace(".", "/") / "__init__.py").exists()


def tree_of(module):
    """The syntax tree of a module, including private ones, or None if there is no such module."""
    path = PACKAGE / ALIASES.get(module, module).replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text()) if module and file.exists() else None


def definition(module, name, depth=0):
    """(module, node) that define a name, followed through imports; None where no Python source does."""
    tree = tree_of(module)
    if tree is None or depth > 4:
        return None
    node = next((n for n in public(tree) if n.name == name), None)
    if node is not None:
        return module, node
    imported = origins(tree, module)
    return definition(*imported[name], depth + 1) if name in imported else None


def offered(module, tree):
    """[(module that defines it, node)] of what a module offers: its `__all__`, else what it defines."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found = [definition(module, name) for name in ast.literal_eval(node.value)]
            return [each for each in found if each is not None]
    own = [(module, node) for node in public(tree)]
    if own:
        return own
    found = []  # a package, or a module that only passes on what others define
    for home, name in origins(tree, module).values():
        inner = module if home == module else f"{home}.{name}".strip(".")
        passed = tree_of(home if name == "*" else inner)
        if name == "*" or (passed is not None and not is_package(module)):
            found += [(home if name == "*" else inner, node) for node in public(passed)]
        else:
            found.append(definition(home, name))
    return [each for each in found if each is not None]


def members(node, module):
    """(kind, node) of a class's public methods and properties: its own in their order, then those of its parts."""
    seen = set()
    classes = [node]
    if node.name in ("Buffer", "Communicator"):
        bases = [(module, node)]
        while bases:
            home, part = bases.pop(0)
            imported = origins(tree_of(home), home)
            names = [ast.unparse(b) for b in part.bases]
            found = [definition(*imported[b]) for b in names if b in imported]
            bases += [pair for pair in found if pair is not None]
            classes += [pair[1] for pair in found if pair is not None]
    for each in classes:
        for item in each.body:
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and item.name not in seen:
                decorators = {ast.unparse(d) for d in item.decorator_list}
                if "overload" in decorators:
                    continue
                if not any(d.endswith(".setter") for d in decorators):
                    seen.add(item.name)
                    yield "property" if decorators & {"property", "cached_property"} else "method", item


def signature(node):
    """`name(arguments)` of a function, a method (without self) or a class."""
    if isinstance(node, ast.ClassDef):
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if init is not None:
            return f"{node.name}({arguments(init)})"
        fields = [
            ast.unparse(f.target) + (f"={default(f.value)}" if f.value else "")
            for f in node.body
            if isinstance(f, ast.AnnAssign) and "init=False" not in ast.unparse(f)
        ]
        return f"{node.name}({', '.join(fields)})" if fields else node.name
    return f"{node.name}({arguments(node)})"


def default(value):
    """A field's default; one that is made anew for every object is `...`."""
    return "..." if isinstance(value, ast.Call) else ast.unparse(value)


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


def entry(name, call, text):
    """A heading, the call and its description."""
    shown = textwrap.wrap(call, 100, subsequent_indent="    ", break_long_words=False)
    return [f"### `{name}`"] + (["```text\n" + "\n".join(shown) + "\n```"] if "(" in call else []) + [text]


class Pages:
    """The API pages, filled module by module."""

    def __init__(self):
        self.parts = {page: [] for page in TOPICS}
        self.names = {page: [] for page in TOPICS}
        self.shown = set()
        self.missing = []

    def add(self, page, prefix, node, module):
        """A class with its members, or a function."""
        where = f"{prefix}.{node.name}"
        short = where.removeprefix("moecomm.")
        self.shown.add((module, node.name))
        self.names[page].append((prefix, short))
        self.parts[page] += entry(short, signature(node), text_of(node, where, self.missing))
        if not isinstance(node, ast.ClassDef):
            return
        for kind, item in members(node, module):
            to = "decode" if node.name == "Buffer" and item.name.startswith(DECODE_VERBS) else page
            name = f"{node.name}.{item.name}"
            call = name if kind == "property" else f"{node.name}.{signature(item)}"
            if to != page:
                self.names[to].append((prefix, name))
            self.parts[to] += entry(
                f"{short}.{item.name}", call, text_of(item, f"{where}.{item.name}", self.missing)
            )

    def add_exported(self):
        """The names that moecomm itself exports."""
        topic = {name: page for page, (_, _, mine, _) in TOPICS.items() for name in mine}
        for page in self.parts:
            for name, home in exported().items():
                found = definition(home, name)
                if found is not None and topic.get(name, page_of(home)) == page:
                    if not self.parts[page]:
                        self.parts[page].append("## moecomm")
                    self.add(page, "moecomm", found[1], found[0])

    def add_module(self, name, tree):
        """What a module offers beyond the names that were shown before it."""
        page = page_of(name)
        outer = name.rpartition(".")[0]
        if page is None or (outer and is_package(outer) and offered(outer, tree_of(outer))):
            return  # the package says what is for users
        shown = [
            (home, node)
            for home, node in offered(name, tree)
            if (home, node.name) not in self.shown and node.name not in HIDDEN
        ]
        objects = "\n".join(constants(tree))
        if not shown and not objects:
            return
        self.parts[page] += [f"## moecomm.{name}", text_of(tree, f"moecomm.{name}", self.missing), objects]
        for home, node in shown:
            self.add(page, f"moecomm.{name}", node, home)

    def render(self):
        """{page: text}.

        Raises
        ------
        Missing
            A public name has no docstring.
        """
        self.add_exported()
        for name, tree in modules().items():
            self.add_module(name, tree)
        if self.missing:
            raise Missing("no docstring: " + ", ".join(self.missing))
        return {page: self.page(page) for page in self.parts if self.parts[page]} | {"index": self.index()}

    def page(self, page):
        """The text of one page."""
        title, about, _, _ = TOPICS[page]
        parts = [
            f"# {title}",
            f"{about}",
            "Shapes are in brackets: T tokens of a rank, N received rows, E experts.",
        ]
        text = "\n\n".join(part for part in parts + self.parts[page] if part)
        return re.sub(r"\n{3,}", "\n\n", text) + "\n"

    def index(self):
        """Every public name with a link to its page."""
        parts = [
            "# API",
            "Made from the docstrings by `python docs/make_api.py`. Every public name is on one page.",
        ]
        for page, (title, about, _, _) in TOPICS.items():
            if not self.parts[page]:
                continue
            rows = {}
            for prefix, name in self.names[page]:
                anchor = name.lower().replace(".", "")
                rows.setdefault(prefix, []).append(f"[`{name.rpartition('.')[2]}`]({page}.md#{anchor})")
            parts += [f"## [{title}]({page}.md)", about]
            parts += ["\n".join(f"- `{prefix}`: {', '.join(links)}" for prefix, links in rows.items())]
        return "\n\n".join(parts) + "\n"


def environment():
    """docs/environment.md, from the calls of `_variable` in moecomm/env.py."""
    calls = [
        node
        for node in ast.walk(ast.parse((PACKAGE / "env.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_variable"
    ]
    rows = []
    for call in sorted(calls, key=lambda c: c.lineno):
        name, value, meaning = map(ast.literal_eval, call.args[:3])
        rows.append(
            f"| `{name}` | {f'`{value}`' if value else 'empty'} | {meaning.replace('|', chr(92) + '|')} |"
        )
    return (
        "# Environment variables\n\n"
        "moecomm reads these variables. Give every rank the same values: ranks that differ raise `ConfigMismatch`. "
        "`mpirun` needs `-x NAME` to pass a variable on; `torchrun` passes all of them.\n\n"
        "This page is made from `moecomm/env.py` by `python docs/make_api.py`. "
        "`moecomm.env.describe()` returns the same table.\n\n"
        "| variable | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        "Other libraries read their own variables. moecomm sets `UCX_HANDLE_ERRORS`, `UCX_ERROR_SIGNALS` and "
        "`UCX_LOG_LEVEL` when it is imported, unless they are set. [SECURITY.md](../SECURITY.md) says which variables "
        "of UCX, gloo, NCCL and MPI choose network interfaces.\n"
    )


def render():
    """{path relative to docs/: text} of all generated pages."""
    return {f"api/{page}.md": text for page, text in Pages().render().items()} | {
        "environment.md": environment()
    }


def main():
    """Write the pages, or check them; returns the exit status."""
    try:
        pages = render()
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    there = {f"api/{p.name}" for p in (DOCS / "api").glob("*.md")}
    if "--check" not in sys.argv[1:]:
        (DOCS / "api").mkdir(exist_ok=True)
        for name in there - set(pages):
            (DOCS / name).unlink()
        for name, text in pages.items():
            (DOCS / name).write_text(text)
        return 0
    old = [n for n, text in pages.items() if not (DOCS / n).exists() or (DOCS / n).read_text() != text]
    if stale := sorted({*old, *(there - set(pages))}):
        print(f"out of date: {', '.join(stale)}; run python docs/make_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
