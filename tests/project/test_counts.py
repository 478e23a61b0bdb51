"""What can be counted: annotations, lines over the limit, places that fill the arguments of a call.

A table below says how many there are where the count is not zero yet. A number may only fall; when it does, write the
new one.
"""

import inspect
import re
from pathlib import Path

import pytest

import moecomm

ROOT = Path(__file__).parents[2]
COLUMNS = 120


def is_annotated(function):
    """Whether every parameter of a function but self, and its result, have annotations."""
    signature = inspect.signature(function)
    named = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    return (
        all(p.annotation is not p.empty for p in named) and signature.return_annotation is not signature.empty
    )


def functions_of(name, thing):
    """(dotted name, function) of a public function, of a class's own public methods and properties, of a module."""
    if inspect.ismodule(thing):
        for inner, value in vars(thing).items():
            if not inner.startswith("_") and getattr(value, "__module__", None) == thing.__name__:
                yield from functions_of(f"{name}.{inner}", value)
    elif inspect.isclass(thing):
        ours = [base for base in reversed(thing.__mro__) if base.__module__.startswith("moecomm.")]
        for inner, value in {k: v for base in ours for k, v in vars(base).items()}.items():
            if inner != "__init__" and inner.startswith("_"):
                continue
            function = (
                getattr(value, "fget", None)
                or getattr(value, "func", None)
                or getattr(value, "__func__", value)
            )
            if inspect.isfunction(function) and "<string>" not in function.__code__.co_filename:
                yield f"{name}.{inner}", function
    elif inspect.isfunction(thing):
        yield name, inspect.unwrap(thing)


PUBLIC = dict(pair for name in moecomm.__all__ for pair in functions_of(name, getattr(moecomm, name)))
# Public functions without annotations, by the first part of their name.
NOT_ANNOTATED = {}


def test_public_names_are_annotated():
    """Every function of moecomm.__all__, and every method of its classes, says its types."""
    missing = [name for name, function in PUBLIC.items() if not is_annotated(function)]
    counts = {}
    for name in missing:
        counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + 1
    assert counts == NOT_ANNOTATED, missing


def test_annotations_are_seen():
    """The test above tells a function without annotations."""

    def bare(x):
        return x

    def half(x: int):
        return x

    def whole(x: int) -> int:
        return x

    assert [is_annotated(f) for f in (bare, half, whole)] == [False, False, True]


SUFFIXES = (".hpp", ".cpp", ".inl", ".cu", ".cuh", ".py", ".pyi", ".pyx", ".pxd", ".pxi")
LONG_LINES = {
    "moecomm": 104,
    "moecomm/_bootstrap": 47,
    "moecomm/_cuda": 27,
    "moecomm/_native": 128,
    "moecomm/balance": 14,
    "moecomm/nn": 8,
    "moecomm/sim": 28,
    "moecomm/sim/planner": 15,
    "moecomm/tracing": 26,
}


def test_no_line_is_too_long():
    """No line of C++, Python or Cython has more than 120 columns."""
    counts = {}
    for folder in ("csrc", "moecomm", "bench", "examples", "tests", "tools", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            generated = path.suffix == ".cpp" and path.with_suffix(".pyx").exists()
            if path.suffix not in SUFFIXES or generated:
                continue
            if long := sum(len(line) > COLUMNS for line in path.read_text().splitlines()):
                where = path.relative_to(ROOT).parent.as_posix()
                counts[where] = counts.get(where, 0) + long
    grown = {where: count for where, count in counts.items() if count > LONG_LINES.get(where, 0)}
    assert not grown


# Objects of these types: one place fills them, so that no field can be left out.
ARGUMENTS = re.compile(r"^\s*(?:DispatchArgs|CombineArgs|Decode(?:Send|Receive|Combine)Args)&? \w+(?:;|\{| =)|"
                       r"\bDecode(?:Send|Receive|Combine)Args\{", re.M)  # fmt: skip
FILLED = {
    "runtime/cpu/buffer.cpp": 4,
    "runtime/cpu/decode.cpp": 5,
    "runtime/cuda/buffer.cpp": 3,
    "runtime/cuda/kernels/launch.hpp": 1,
    "runtime/sim/calls.hpp": 1,
    "runtime/sim/decode.hpp": 4,
    "runtime/sim/world.cpp": 3,
}


def test_arguments_are_filled_in_one_place():
    """The arguments of dispatch, combine and decode are filled in no more places than today."""
    counts = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        name = path.relative_to(ROOT / "csrc")
        if path.suffix not in SUFFIXES or name.parts[0] in ("protocol", "schedule"):
            continue
        if found := len(ARGUMENTS.findall(path.read_text())):
            counts[name.as_posix()] = found
    grown = {name: count for name, count in counts.items() if count > FILLED.get(name, 0)}
    assert not grown


@pytest.mark.parametrize(
    "line,found",
    [
        ("  DispatchArgs a;", True),
        ("  CombineArgs a{view_};", True),
        ("  CombineArgs& a = launch.args;", True),
        ("  sim(f, DecodeReceiveArgs{view_, turn});", True),
        ("  Status run(const DispatchArgs& a);", False),
        ("  bool ask(const DispatchCall& call, DispatchArgs& a, Status& bad);", False),
    ],
)
def test_arguments_are_seen(line, found):
    """The pattern tells a place that fills arguments from one that reads them."""
    assert bool(ARGUMENTS.search(line)) is found
