"""Counted rules: annotations, long lines, places that fill the arguments of a call. Every count is zero."""

import inspect
import re
from pathlib import Path

import pytest

import moecomm

ROOT = Path(__file__).parents[2]
COLUMNS = 120


def is_annotated(function):
    """Tell whether all parameters of a function except self, and its result, have annotations."""
    signature = inspect.signature(function)
    named = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    return (
        all(p.annotation is not p.empty for p in named) and signature.return_annotation is not signature.empty
    )


def functions_of(name, thing):
    """Return (dotted name, function) of a public function, or of the public functions in a class or module."""
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


def test_public_names_are_annotated():
    """All functions of moecomm.__all__, and all methods of its classes, are annotated."""
    assert len(PUBLIC) > 100, "the search found too little"
    assert [name for name, function in PUBLIC.items() if not is_annotated(function)] == []


def test_annotations_are_seen():
    """The test above finds a function without annotations."""

    def bare(x):
        return x

    def half(x: int):
        return x

    def whole(x: int) -> int:
        return x

    assert [is_annotated(f) for f in (bare, half, whole)] == [False, False, True]


SUFFIXES = (".hpp", ".cpp", ".inl", ".cu", ".cuh", ".py", ".pyi", ".pyx", ".pxd", ".pxi")


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
    assert not counts


# Each of these types has one function of csrc/session/ that makes it, so that no field is forgotten.
STRUCTURES = ("DispatchArgs", "CombineArgs", "DecodeSendArgs", "DecodeReceiveArgs", "DecodeCombineArgs")
# A function that returns one, a variable without an initializer or with one in braces, an object in braces.
MADE = re.compile(
    r"\b({})(?:&? make_\w+\((?=[^}}]*?return \{{)| \w+(?:;|\{{)|\{{|\()".format("|".join(STRUCTURES))
)


def places_that_make(text):
    """Return the structures that the text makes, one entry per place."""
    code = re.sub(r"//[^\n]*", "", text)
    return [m[1] for m in MADE.finditer(code)]


def test_arguments_are_filled_in_one_place():
    """One function makes each structure; all runtimes and the C++ tests call it."""
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "tests" / "cpp").glob("*")]
    found = {}
    for path in sorted(p for p in sources if p.suffix in SUFFIXES):
        folder = path.relative_to(ROOT).parts[1]
        if folder in ("protocol", "schedule"):  # declared there, and passed on
            continue
        for name in places_that_make(path.read_text()):
            found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    arguments, decode = "csrc/session/arguments.hpp", "csrc/session/decode_arguments.hpp"
    # The launch of a kernel has a member of that type, which has no default either.
    assert found.pop("CombineArgs") == ["csrc/runtime/cuda/kernels/launch.hpp", arguments]
    assert found == {
        name: [decode if "Decode" in name else arguments] for name in STRUCTURES if name != "CombineArgs"
    }


@pytest.mark.parametrize(
    "text,found",
    [
        ("  DispatchArgs a;", True),
        ("  CombineArgs a{view_};", True),
        ("  sim(f, DecodeReceiveArgs{view_, turn});", True),
        ("  sim(f, DecodeReceiveArgs(view_, turn));", True),
        ("constexpr DispatchArgs make_it(const View& b,\n  int c) {\n  return {b, c};", True),
        ("constexpr DispatchArgs make_it(const View& b) {\n  return make_other(b);", False),
        ("  const DispatchArgs a = make_dispatch_args(view_);", False),
        ("  Status run(const DispatchArgs& a);", False),
        ("  // as DispatchArgs{b} says", False),
    ],
)
def test_arguments_are_seen(text, found):
    """The pattern distinguishes places that fill arguments from places that read them."""
    assert bool(places_that_make(text)) is found
