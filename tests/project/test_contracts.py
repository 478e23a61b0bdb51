"""Contracts of the C++ sources: short roles, constrained templates, checked fabrics, few casts, named numbers."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SHARED = ("protocol", "schedule", "session")  # run by every world
SUFFIXES = (".hpp", ".cpp", ".inl", ".cu", ".cuh")
ROLE_LINES = 60


def sources(*folders):
    """Return the C++ files of folders of csrc."""
    return sorted(p for folder in folders for p in (CSRC / folder).rglob("*") if p.suffix in SUFFIXES)


def without_comments(text):
    """Return the code without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def functions(text):
    """Return (name, lines) of every function at namespace scope of a formatted file."""
    lines, start = text.splitlines(), None
    for i, line in enumerate(lines):
        begins = re.match(r"[A-Za-z]", line) and not re.match(
            r"(namespace|struct|class|enum|union|using|template|static_assert|inline namespace)\b", line
        )
        if begins and start is None:
            start = i
        if line.startswith("}") or line.endswith("}"):
            name = start is not None and re.search(r"(\w+)\(", " ".join(lines[start : i + 1]))
            if name and (line.startswith("}") or start == i):
                yield name[1], i - start + 1
            if line.startswith("}") or start == i:
                start = None
        elif start is not None and line.endswith(";") and not line.startswith(" "):
            start = None


def test_functions_are_seen():
    """The pattern finds functions of one line, of several, and after a template, but not declarations."""
    text = "int one() { return 1; }\nint declared();\n"
    text += "template <Group G>\nMOE_HD Status role(G g,\n    int x) {\n  f();\n}\n"
    assert list(functions(text)) == [("one", 1), ("role", 4)]


@pytest.mark.parametrize("path", sources(*SHARED), ids=lambda p: str(p.relative_to(CSRC)))
def test_roles_fit_on_a_screen(path):
    """No role, and no function that runs one, has more than 60 lines."""
    assert {name: n for name, n in functions(path.read_text()) if n > ROLE_LINES} == {}


def test_roles_are_found():
    """The test above has found the roles."""
    names = {name for path in sources("protocol") for name, _ in functions(path.read_text())}
    assert {
        "announce",
        "send",
        "place",
        "forward",
        "arrive",
        "reduce",
        "sum",
        "decode_send",
        "decode_sum",
    } <= names


# Names: F is a fabric, G a group, Rail a rail; Barrier and Latches synchronize groups; Rules are the rules of a
# session.
UNCONSTRAINED = re.compile(
    r"template <[^>{]*\bclass (?:F|G|Fabric\w*|Group\w*|Latches|Barrier|Rail|Rules)\b[^{;]*?(?=[{;])"
)


def unconstrained(text):
    """Return the templates over a fabric or a group without a concept; concepts themselves are excluded."""
    found = set()
    for match in UNCONSTRAINED.finditer(without_comments(text)):
        if not re.search(r"\bconcept\b", match[0]) and (
            name := re.search(r"(\w+)\s*\(|struct (\w+)", match[0])
        ):
            found.add(name[1] or name[2])
    return found


@pytest.mark.parametrize(
    "path", sources(*SHARED, "fabric", "runtime"), ids=lambda p: str(p.relative_to(CSRC))
)
def test_concepts_constrain_templates(path):
    """A template over a group or a fabric names its concept, so that errors appear where it is used."""
    assert unconstrained(path.read_text()) == set()


def test_constraints_are_seen():
    """The pattern distinguishes constrained templates from others."""
    assert unconstrained("template <class G, class F>\nStatus role(G g, F f) {\n}") == {"role"}
    assert unconstrained("template <class Rail>\nstruct Fabric {\n};") == {"Fabric"}
    assert unconstrained("template <Group G, Fabric<G> F>\nStatus role(G g, F f) {\n}") == set()
    assert unconstrained("template <class G>\nconcept Group = requires(G g) {\n};") == set()


@pytest.mark.parametrize(
    "file,fabric",
    [
        ("cpu/ucx_rail.hpp", "HostFabric<UcxRail>"),
        ("cpu/loopback.hpp", "HostFabric<LoopbackRail>"),
        ("cuda/device.cuh", "DeviceFabric<LoopbackDeviceRail>"),
        ("cuda/gin.cuh", "DeviceFabric<GinRail>"),
        ("cuda/domain.cuh", "DomainFabric<LoopbackDeviceRail>"),
        ("sim/net.hpp", "SimFabric"),
        ("sim/mutant.hpp", "MutantFabric"),
    ],
)
def test_fabrics_are_checked(file, fabric):
    """Every fabric is checked against the concept where it is defined."""
    assert f"static_assert(Fabric<{fabric}," in (CSRC / "fabric" / file).read_text()


def test_no_fabric_is_forgotten():
    """Each rail of a rank, and each class derived from a fabric, is in the table above."""
    text = "\n".join(without_comments(p.read_text()) for p in sources("fabric"))
    rails = set(re.findall(r"^(?:struct|class) (\w*Rail)\b[^;]*\{", text, re.M))
    fabrics = set(re.findall(r"^(?:struct|class) (\w*Fabric)\b[^;]*\{", text, re.M))
    checked = set(re.findall(r"\w+", " ".join(re.findall(r"Fabric<(.+?), \w+>", text))))
    assert rails and fabrics and rails | fabrics <= checked, sorted((rails | fabrics) - checked)


CASTS = 11  # reinterpret_cast in csrc: it may only fall


def test_casts_are_few():
    """Offsets are typed, so that few places compute addresses."""
    found = sum(without_comments(p.read_text()).count("reinterpret_cast") for p in sources(""))
    assert found == CASTS, f"{found} reinterpret_casts; write the number here if it has fallen"
