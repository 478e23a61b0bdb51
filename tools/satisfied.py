"""Whether everything that some extras of pyproject.toml need is installed: `python tools/satisfied.py EXTRA...`.

The exit status is 1 where a requirement is missing or has another version; each is printed.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def missing(extras):
    """[requirement] that is not met, of the project's dependencies and of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    return [line for line in needed if not is_met(Requirement(line))]


def is_met(requirement):
    """Whether a distribution of this name and version is installed, or not needed on this machine."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    found = missing(sys.argv[1:])
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
