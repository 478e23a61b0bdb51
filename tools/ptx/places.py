"""Where in the sources an instruction comes from: the functions that nvcc has inlined, from the innermost outwards."""

import re
from functools import cache
from pathlib import Path

LOC = re.compile(
    r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:, function_name (\$?\w+), inlined_at (\d+) (\d+) (\d+))?\s*$"
)
SMALL = (
    "ptx.cuh",
    "warp.cuh",
    "group.hpp",
    "squad.cuh",
    "intrinsics.hpp",
)  # what is inlined everywhere tells nothing


class Places:
    """Of the lines of a PTX text. A place is (function, file, line); the outermost function is the kernel, ""."""

    def __init__(self, text):
        lines = text.split("\n")
        names, files = _names(lines), {}
        self._chains, now, known = [()], (), {}
        for line in lines:
            if line.startswith("\t.file"):
                number, path = re.search(r'(\d+) "([^"]*)"', line).groups()
                files[int(number)] = path
            elif ".loc" in line and (m := LOC.match(line)):
                file, row, column = map(int, m.group(1, 2, 3))
                at = tuple(map(int, m.group(5, 6, 7))) if m[5] else None
                now = known[file, row, column] = (
                    (file, row, names.get(m[4], "") if m[4] else ""),
                    known.get(at, ((*at[:2], ""), None)) if at else None,
                )
            self._chains.append(now)
        self._files = files

    def of(self, line):
        """Places of a line of the PTX, the innermost first."""
        found, link = [], self._chains[line]
        while link:
            (file, row, name), link = link
            found.append((name, self._files.get(file, "?"), row))
        return found

    def caller(self, line):
        """`file:line` of the innermost place that is no helper of all code."""
        for _, file, row in self.of(line):
            if row and not file.endswith(SMALL):
                return f"{file.rsplit('/', 1)[-1]}:{row}"
        return "?"

    def functions(self, line):
        """Names of the functions that an instruction is part of, the innermost first."""
        return [name for name, _, _ in self.of(line)]

    def statements(self, line):
        """Text of the source lines that an instruction comes from."""
        return [source_line(file, row) for _, file, row in self.of(line)]


def _names(lines):
    """{label: short name} of the strings of .debug_str: those of functions, without namespaces and arguments."""
    found, label = {}, None
    for line in lines:
        if m := re.match(r"(\$L__info_string\d+):(.*)", line):
            label, line = m[1], m[2]
            found[label] = bytearray()
        if label and (m := re.match(r"\s*\.b8 ([\d,]+)", line)):
            found[label] += bytes(map(int, m[1].split(",")))
    return {label: short_name(text.split(b"\0")[0].decode()) for label, text in found.items()}


def short_name(mangled):
    """`moecomm::detail::f<...>(...)` as `f`; a lambda has the name of its function."""
    at, name = re.match(r"_Z+N?K?", mangled).end() if mangled.startswith("_Z") else 0, mangled
    while m := re.match(r"(\d+)", mangled[at:]):
        begin = at + len(m[1])
        at = begin + int(m[1])
        name = mangled[begin:at]
        if at < len(mangled) and mangled[at] == "I" and name.startswith("_INTERNAL"):
            break
    return name


@cache
def _lines(path):
    file = Path(path)
    return file.read_text(errors="replace").split("\n") if file.exists() else []


def source_line(path, row):
    """A line of a source file, with the next ones up to the end of its statement."""
    text, lines = "", _lines(path)
    for line in lines[max(0, row - 1) : row + 3]:
        text += " " + line.strip()
        if line.rstrip().endswith((";", "{", "}")):
            break
    return text
