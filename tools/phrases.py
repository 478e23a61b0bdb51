"""Banned phrases and their replacements: `python tools/phrases.py FOLDERS OR FILES`.

Exits with status 1 if it finds one. CONTRIBUTING.md describes the style.
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
    r"on (?:its|their) way out\b": "source of outgoing puts",
    r"takes? no part but\b": "only announces that it refuses",
    r"wanted an end\b": "interrupted",
    r"world-blind\b": "independent of the world",
    r"whole 16 bytes\b": "multiples of 16 bytes",
    r"\w*(?:neighbour|behaviour|modelled|travelling|initialis|synchronis|amortis|labelled|signalled)\w*": (
        "American spelling"
    ),
}
# Also banned in C++.
CXX = {
    r"whoever|whomever": "name it: the rank that, a caller that",
    r"looked at\b": "is read, is checked",
    r"what (?:it|they) (?:has|have) come to\b": "the result of",
    r"what becomes of\b": "the result of",
    r"for ever\b": "permanently",
    r"hand(?:s|ed)? (?:out|back)\b": "distribute, return",
    r"dealt(?! out)\b": "assigned round-robin",
    r"once told\b": "when it is returned",
    r"(?:starts?|begins?|lies?|lie) on (?:16|64) bytes\b": "is 16-byte aligned",
    r"is meant\b|are meant\b": "name it",
}
# Also banned in C++, Python, Cython and Markdown files.
STRICT = {
    r"nobody(?! has (?:freed|written))": "no rank, no call; or name it",
    r"somebody|everybody": "another rank, all ranks; or name them",
    r"(?:is|are) there to be": "must be",
    r"by that name": "with this name",
    r"as far as (?:it|they|that) goe?s?\b": "if supported; the part that",
    r"(?:the )?way that (?:it|they) (?:has|have) come": "unchanged",
    r"said to (?:its|the|their) peers": "reported to the peers",
    r"could (?:not )?be told\b": "could (not) be reported to",
    r"is told (?:so|of)": "gets the error, receives",
    r"where there (?:is|are)\b": "if there is, with",
    r"(?:dealt|shared) out\b": "distributed",
    r"in turns\b|takes? turns\b": "alternates, interleaved",
    r"once more\b": "again",
    r"anew to\b": "again",
    r"on (?:its|their) way\b": "in flight, when it is sent",
    r"come(?:s)? to nothing": "fails",
    r"what comes of": "the result of",
    r"(?:carry|carries) every": "sends every",
    r"is wanted or\b": "is required or",
    r"(?:is|are) good for\b": "is valid for",
    r"for whom\b": "for which ranks",
    r"to be had\b": "available",
    r"under way yet": "in flight",
    r"the reverse;": "name both cases",
    r"such as there (?:is|are)": "if any",
    r"a riddle": "state it",
}
# Python files whose banned phrases are not comments but data.
SKIP = {"phrases.py"}


def _pattern(phrases):
    return re.compile(r"\b(?:" + "|".join(f"({p})" for p in phrases) + ")", re.I)


CODE = (".hpp", ".cpp", ".inl", ".cu", ".cuh")
BASIC, ALL, ALL_CXX = (
    _pattern(PHRASES),
    _pattern({**PHRASES, **STRICT}),
    _pattern({**PHRASES, **STRICT, **CXX}),
)


def is_strict(path):
    """Tell whether STRICT applies to a file."""
    return path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".md", *CODE)


def hits(path):
    """Return [(line number, phrase, replacement)] of a file."""
    found = []
    pattern = BASIC if not is_strict(path) else ALL_CXX if path.suffix in CODE else ALL
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for match in pattern.finditer(line):
            better = next(
                b for p, b in {**PHRASES, **STRICT, **CXX}.items() if re.fullmatch(p, match[0], re.I)
            )
            found.append((number, match[0], better))
    return found


def files(places):
    """Yield the text files in folders and files, without generated ones and those of SKIP."""
    for place in map(Path, places):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            generated = path.suffix == ".cpp" and path.with_suffix(".pyx").exists()
            if path.suffix in SUFFIXES and path.is_file() and not generated and path.name not in SKIP:
                yield path


def main(places):
    """Print the hits; return the exit status."""
    lines = [
        f"{path}:{number}: {phrase!r}; write: {better}"
        for path in files(places)
        for number, phrase, better in hits(path)
    ]
    print(*lines, sep="\n", end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
