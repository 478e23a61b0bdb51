"""Tests of conventions: docstrings, include order, the world-independent protocol, stubs, file sizes."""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import moecomm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import sources  # noqa: E402

CSRC = ROOT / "csrc"
LAYERS = ["base", "balance", "exec", "fabric", "protocol", "schedule", "session", "runtime"]
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".hpp", ".cpp", ".inl", ".cu", ".cuh"))
PYTHON = sorted(
    p for folder in ("moecomm", "bench", "examples", "tests", "tools") for p in (ROOT / folder).rglob("*.py")
)


def public():
    """Return (dotted name, object) of all public names: moecomm.__all__, its methods, functions of its modules."""
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
            parts = [part for part in reversed(thing.__mro__) if part.__module__.startswith("moecomm")]
            for inner, value in (item for part in parts for item in vars(part).items()):
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
    """A summary line of one sentence, then a blank line if there is more."""
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
    """Docstrings of verbs have parameters with shapes, and errors; methods from a paper name it."""
    doc = inspect.getdoc(PUBLIC[name])
    takes = [p for p in inspect.signature(PUBLIC[name]).parameters if p not in ("self", "comm")]
    if name != "Buffer.size_hint":  # its arguments are those of Buffer
        missing = [p for p in takes if not re.search(rf"\b{p}\b", doc)]
        assert not missing, f"{name}: {missing} are not documented"
    if not name.startswith("reference"):
        assert "Raises\n" in doc, f"{name}: no Raises"
    if name in ("Buffer.dispatch", "Buffer.combine", "reference.dispatch", "reference.combine"):
        assert re.search(r"\[[TN], ?(hidden|top_k)\]", doc), f"{name}: no shapes"
    if name.startswith(("Buffer.d", "Buffer.c", "gate")):
        assert "Source:" in doc, f"{name}: no Source"


def layer_of(path):
    """Return the folder of csrc of a file or an include."""
    return Path(path).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_upwards(path):
    """Each folder of csrc includes only itself and those above it."""
    here = LAYERS.index(layer_of(path.relative_to(CSRC)))
    for included in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M):
        if layer_of(included) in LAYERS:
            assert LAYERS.index(layer_of(included)) <= here, f"{path.relative_to(CSRC)} includes {included}"


WORLDLY = re.compile(r"cuda|nccl|ucp|ucx|unistd|sys/|linux/|pthread|sched\.h|__CUDA|__global__", re.I)
HOSTED = re.compile(r"std::(thread|mutex|atomic|vector|string)|\bthrow\b|\bvirtual\b|\bnew\b ")


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if layer_of(p.relative_to(CSRC)) in ("protocol", "session")],
    ids=lambda p: str(p.relative_to(CSRC)),
)
def test_protocol_and_session_know_no_world(path):
    """No header or macro of a world, except in comments.

    The protocol runs on GPUs, so it has no allocations, exceptions or virtual calls either.
    """
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    patterns = [WORLDLY, HOSTED] if layer_of(path.relative_to(CSRC)) == "protocol" else [WORLDLY]
    found = [m.group() for pattern in patterns for m in pattern.finditer(code)]
    assert not found, f"{path.name}: {found}"


def test_one_file_asks_for_the_compiler():
    """__CUDACC__ appears only in base/portability.hpp, in sources shared by worlds."""
    asking = [
        str(p.relative_to(CSRC))
        for p in SOURCES
        if "__CUDACC__" in p.read_text() and "cuda" not in p.relative_to(CSRC).parts
    ]
    assert asking == ["base/portability.hpp"]


def stub_names(body):
    """Return {name: parameter names or None} of a stub's functions, methods and classes."""
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


NATIVE = ROOT / "moecomm" / "_native"
CYTHON = sorted(NATIVE.rglob("*.pyx"))


def module_of(path):
    """The name of a native module under moecomm._native."""
    return ".".join(path.relative_to(NATIVE).with_suffix("").parts)


def load_native(name):
    """A native module; skips where it is not built, or not since it has its parts."""
    path = f"moecomm/_native/{name.replace('.', '/')}.pyx"
    library = next((k for k, parts in sources.PARTS.items() if path in parts), f"moecomm._native.{name}")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not built here")
    importlib.import_module(library)  # built: then it loads too, and its parts with it
    parts = [f"moecomm._native.{module_of(ROOT / part)}" for part in sources.PARTS.get(library, [])]
    if not all(part in sys.modules for part in parts):
        pytest.skip(f"{library} is an older build")
    return sys.modules[f"moecomm._native.{name}"]


@pytest.mark.parametrize("path", CYTHON, ids=module_of)
def test_one_class_per_module(path):
    """A native module has one class, or functions alone; what it uses of others it cimports."""
    text = path.read_text()
    assert len(re.findall(r"^(?:cdef )?class ", text, re.M)) <= 1
    assert not re.search(r"^ *include ", text, re.M)


def test_no_cython_text_is_included():
    assert not list(NATIVE.rglob("*.pxi"))


@pytest.mark.parametrize("name", ["core", "cuda", "sim"])
def test_extension_stub(name):
    """The stub of an extension with parts names what it takes from them."""
    native = load_native(name)
    nodes = [n for n in ast.parse((NATIVE / f"{name}.pyi").read_text()).body if isinstance(n, ast.ImportFrom)]
    said = {f"moecomm._native.{n.module}": sorted(a.name for a in n.names) for n in nodes}
    for module, names in said.items():
        assert all(getattr(native, k) is getattr(sys.modules[module], k) for k in names)
    assert {k for names in said.values() for k in names} == {
        k for k in vars(native) if not k.startswith("_") and k not in ("core", "load_parts")
    }


@pytest.mark.parametrize("module", [module_of(p) for p in CYTHON])
def test_stub(module):
    """Every native module has a stub that names what it has, with the same parameters, and nothing else."""
    stub = NATIVE / f"{module.replace('.', '/')}.pyi"
    assert stub.exists(), f"{module} has no stub"
    native = load_native(module)
    said = stub_names(ast.parse(stub.read_text()).body)
    source = stub.with_suffix(".pyx").read_text()
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
            [
                p.split("=")[0].split()[-1]
                for p in re.sub(r"\[[^\]]*\]| not None", "", head).split(",")
                if p.strip()
            ]
            for head in heads
        ]
        assert parameters in [[p for p in r if p != "self"] for r in real], (
            f"{name}: the stub has {parameters}, the module {real}"
        )


LIMIT = 450
# Its docstrings document all verbs of the library in one place, and do not count.
FACE = "moecomm/buffer.py"


def docstring_lines(source):
    """Return the number of lines of docstrings."""
    nodes = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module))
    ]
    found = [n.body[0] for n in nodes if ast.get_docstring(n)]
    return sum(d.end_lineno - d.lineno + 1 for d in found)


def test_files_are_short():
    """Files have at most 450 lines; the file of the public class has that many besides its docstrings."""
    files = [
        *SOURCES,
        *PYTHON,
        *(ROOT / "tests" / "cpp").glob("*.?pp"),
        *(p for p in NATIVE.rglob("*") if p.suffix in (".pyx", ".pxd")),
    ]
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    lines[FACE] -= docstring_lines((ROOT / FACE).read_text())
    assert {name: n for name, n in lines.items() if n > LIMIT} == {}
    assert docstring_lines('"""A."""\ndef f():\n    """B.\n\n    C\n    """\n    return "D"') == 5


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
    """The user may change torch's default dtype and device, and native code would misread such tensors."""
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
