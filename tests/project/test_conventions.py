"""Conventions are tests: docstrings, include order, a protocol that knows no world, stubs, file sizes."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import moecomm

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
LAYERS = ["base", "balance", "exec", "fabric", "protocol", "schedule", "runtime"]
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".hpp", ".cpp", ".inl", ".cu", ".cuh"))
PYTHON = sorted(
    p for folder in ("moecomm", "bench", "examples", "tests", "tools") for p in (ROOT / folder).rglob("*.py")
)


def public():
    """(dotted name, object) of everything public: names of moecomm.__all__, methods of its classes,
    functions of its modules.
    """
    found = {}
    for name in moecomm.__all__:
        thing = getattr(moecomm, name)
        if inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                if not inner.startswith("_") and getattr(value, "__module__", None) == thing.__name__:
                    found[f"{name}.{inner}"] = value
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            found[name] = thing
    for name, thing in list(found.items()):
        if inspect.isclass(thing) and thing.__module__.startswith("moecomm"):
            for inner, value in vars(thing).items():
                if (
                    not inner.startswith("_") and isinstance(value, (property, staticmethod, classmethod))
                ) or (inspect.isfunction(value) and not inner.startswith("_")):
                    found[f"{name}.{inner}"] = (
                        value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                    )
    return found


PUBLIC = public()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring(name):
    """A summary line of one sentence; then a blank line, where there is more."""
    doc = inspect.getdoc(PUBLIC[name])
    assert doc, f"{name} has no docstring"
    lines = doc.splitlines()
    assert re.match(r"[^a-z]|[a-z]+[.\w]*[(\d]", lines[0]) or lines[0][0] in ".{`", (
        f"{name}: the summary begins in lower case: {lines[0]!r}"
    )
    assert len(lines) == 1 or lines[1] == "" or not lines[0].endswith("."), (
        f"{name}: no blank line behind the summary"
    )


@pytest.mark.parametrize(
    "name",
    [
        "Communicator",
        "Buffer",
        "Buffer.dispatch",
        "Buffer.combine",
        "Buffer.size_hint",
        "run_local",
        "reference.dispatch",
        "reference.combine",
        "gate.sigmoid_gate",
        "gate.group_limited_top_k",
    ],
)
def test_docstring_of_a_verb(name):
    """The verbs say what goes in, in which shape, and what they raise; what rests on a paper names it."""
    doc = inspect.getdoc(PUBLIC[name])
    takes = [p for p in inspect.signature(PUBLIC[name]).parameters if p not in ("self", "comm")]
    if name != "Buffer.size_hint":  # "with these arguments": it takes those of Buffer
        missing = [p for p in takes if not re.search(rf"\b{p}\b", doc)]
        assert not missing, f"{name}: {missing} are not documented"
    if not name.startswith("reference"):
        assert "Raises\n" in doc, f"{name}: no Raises"
    if name in ("Buffer.dispatch", "Buffer.combine", "reference.dispatch", "reference.combine"):
        assert re.search(r"\[[TN], ?(hidden|top_k)\]", doc), f"{name}: no shapes"
    if name.startswith(("Buffer.d", "Buffer.c", "gate")):
        assert "Source:" in doc, f"{name}: no Source"


def layer_of(path):
    """The folder of csrc that a file or an include belongs to."""
    return Path(path).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_upwards(path):
    """Each folder of csrc includes only itself and those above it."""
    here = LAYERS.index(layer_of(path.relative_to(CSRC)))
    for included in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M):
        if layer_of(included) in LAYERS:
            assert LAYERS.index(layer_of(included)) <= here, f"{path.relative_to(CSRC)} includes {included}"


WORLDLY = re.compile(
    r"cuda|nccl|ucp|ucx|unistd|sys/|linux/|pthread|sched\.h|__CUDA|__global__|"
    r"std::(thread|mutex|atomic|vector|string)|\bthrow\b|\bvirtual\b|\bnew\b ",
    re.I,
)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if layer_of(p.relative_to(CSRC)) == "protocol"], ids=lambda p: p.name
)
def test_protocol_knows_no_world(path):
    """No header or macro of a world, no allocation, exception or virtual call; comments may speak of them."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    assert not (bad := WORLDLY.findall(code) and WORLDLY.search(code).group()), f"{path.name}: {bad}"


def test_one_file_asks_for_the_compiler():
    """__CUDACC__ appears in base/portability.hpp alone, as far as worlds share the sources."""
    asking = [
        str(p.relative_to(CSRC))
        for p in SOURCES
        if "__CUDACC__" in p.read_text() and "cuda" not in p.relative_to(CSRC).parts
    ]
    assert asking == ["base/portability.hpp"]


def stub_names(body):
    """{name: parameter names or None} of a stub's functions, methods and classes."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = None
            found.update(
                {f"{node.name}.{k}": v for k, v in stub_names(node.body).items() if not k.startswith("_")}
            )
            found.update(
                {f"{node.name}.{n.target.id}": None for n in node.body if isinstance(n, ast.AnnAssign)}
            )
        elif isinstance(node, ast.FunctionDef):
            is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
            found[node.name] = None if is_property else [a.arg for a in node.args.args if a.arg != "self"]
    return found


@pytest.mark.parametrize("module", sorted(p.stem for p in (ROOT / "moecomm" / "_native").glob("*.pyx")))
def test_stub(module):
    """Every native module has a stub that names what it has, with the same parameters, and nothing else."""
    stub = ROOT / "moecomm" / "_native" / f"{module}.pyi"
    assert stub.exists(), f"{module}.pyx has no stub"
    if importlib.util.find_spec(f"moecomm._native.{module}") is None:
        pytest.skip(f"{module} is not built here")
    native = importlib.import_module(f"moecomm._native.{module}")  # built: then it loads too
    said = stub_names(ast.parse(stub.read_text()).body)
    source = "".join(
        p.read_text() for p in stub.parent.glob("*.p*") if p.name == f"{module}.pyx" or p.suffix == ".pxi"
    )
    real = {}
    for name, value in vars(native).items():
        if (
            name.startswith("_")
            or not (isinstance(value, type) or callable(value))
            or getattr(value, "__module__", "") not in (f"moecomm._native.{module}", module)
        ):
            continue
        real[name] = None
        if isinstance(value, type):
            real.update({f"{name}.{k}": None for k in vars(value) if not k.startswith("_")})
    assert set(said) == set(real), (
        f"only in the stub: {sorted(set(said) - set(real))}; missing there: {sorted(set(real) - set(said))}"
    )
    for name, parameters in said.items():
        if parameters is None:
            continue
        heads = re.findall(rf"^ *(?:cp)?def {name.split('.')[-1]}\(([^)]*)\)", source, re.M)
        real = [
            [p.split("=")[0].split()[-1] for p in re.sub(r"\[[^\]]*\]", "", head).split(",") if p.strip()]
            for head in heads
        ]
        assert parameters in [[p for p in r if p != "self"] for r in real], (
            f"{name}: the stub has {parameters}, the module {real}"
        )


LIMIT = 450
# Longer than the limit: they may shrink, not grow.
LONG = {
    "moecomm/buffer.py": 748,
    "moecomm/communicator.py": 494,
    "moecomm/_cuda/cuda.py": 484,
    "moecomm/sim/explore.py": 564,
    "moecomm/_bootstrap/mesh.py": 535,
}


def test_files_are_short():
    """No file holds two ideas."""
    files = [
        *SOURCES,
        *PYTHON,
        *(ROOT / "tests" / "cpp").glob("*.?pp"),
        *(ROOT / "moecomm" / "_native").glob("*.pyx"),
    ]
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lines.items() if n > LONG.get(name, LIMIT)} == {}


def test_every_variable_is_in_one_place():
    """MOECOMM_* variables that the library reads are listed in env.py."""
    used = set()
    for path in [*SOURCES, *(ROOT / "moecomm").rglob("*.py")]:
        used |= set(
            re.findall(
                r"""(?:getenv|environ\.get|env_bytes|environ\[|getenv)\(?\(?["'](MOECOMM_\w+)""",
                path.read_text(),
            )
        )
    listed = {name for name, *_ in moecomm.env.describe()}
    assert used <= listed, f"not in env.py: {sorted(used - listed)}"


FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "moecomm").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_new_tensors_name_dtype_and_device(path):
    """torch.set_default_dtype and torch.set_default_device belong to the user: native code would read such
    tensors as something else.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            not isinstance(node, ast.Call)
            or not isinstance(node.func, ast.Attribute)
            or getattr(node.func.value, "id", None) != "torch"
        ):
            continue
        wanted = (
            {"dtype", "device"}
            if node.func.attr in FACTORIES
            else {"dtype"}
            if node.func.attr == "frombuffer"
            else set()
        )
        given = {k.arg for k in node.keywords}
        assert None in given or wanted <= given, (
            f"{path.name}:{node.lineno}: torch.{node.func.attr} without {sorted(wanted - given)}"
        )
