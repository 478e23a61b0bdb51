"""Phrases that a reader stumbles over, and what to write instead: `python tools/phrases.py FOLDERS OR FILES`.

Exits with 1 where one is found. The style that this table serves is described in CONTRIBUTING.md.
"""

import re
import sys
from pathlib import Path

SUFFIXES = {
    ".py",
    ".pyx",
    ".pxd",
    ".pxi",
    ".pyi",
    ".md",
    ".hpp",
    ".cpp",
    ".inl",
    ".cu",
    ".cuh",
    ".mk",
    ".toml",
}
PHRASES = {
    r"the own\b": "its own, this rank's",
    r"in vain\b": "timed out waiting for",
    r"so many\b": "the number itself: n, at most n",
    r"of ours\b": "of moecomm",
    r"(is|are|be) no news\b": "is ignored",
    r"nobody's business": "is not an error",
    r"everybody's\b": "each rank's",
    r"in the mean\b": "on average",
    r"lies ready": "is ready",
    r"as good as before": "is usable as before",
    r"all the same\b": "still, even so, equal",
    r"alike\b": "the same on all ranks, both",
    r"where there are such": "if there are any",
    r"(is|are|be) mended": "is fixed",
    r"for good\b": "permanently",
    r"which says comm\b": "expects self.comm",
    r"comes? to (it|this) that\b": "if",
    r"what waits\b": "waits, a wait",
    r"is to name\b": "names",
    r"by that much\b": "the quantity itself",
    r"hereby|thereof|wherein|whereupon|heretofore": "a sentence of its own",
    r"nothing of the kind": "none",
    r"(?:has|have|are|is) sense\b": "makes sense",
    r"goes? without saying": "leave it out",
}
FIND = re.compile(r"\b(?:" + "|".join(f"({p})" for p in PHRASES) + ")", re.I)


def hits(path):
    """[(line number, phrase, what to write instead)] of a file."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for match in FIND.finditer(line):
            better = next(b for p, b in PHRASES.items() if re.fullmatch(p, match[0], re.I))
            found.append((number, match[0], better))
    return found


def files(places):
    """Text files in folders and files, without this one and what was generated."""
    for place in map(Path, places):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            generated = path.suffix == ".cpp" and path.with_suffix(".pyx").exists()
            if path.suffix in SUFFIXES and path.is_file() and not generated and path.name != "phrases.py":
                yield path


def main(places):
    """Print what was found; the exit status."""
    lines = [
        f"{path}:{number}: {phrase!r}; write: {better}"
        for path in files(places)
        for number, phrase, better in hits(path)
    ]
    print(*lines, sep="\n", end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
