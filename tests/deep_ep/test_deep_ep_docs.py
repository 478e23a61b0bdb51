"""docs/deep_ep.md: its table has all public names of the drop-in. tests/docs runs its code."""

import inspect
import re
from pathlib import Path

from moecomm.integrations import deep_ep

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deep_ep.md").read_text()


def test_every_public_name_is_in_the_table():
    """The table has the names of the package, and the methods and properties of its classes, and no others."""
    first = " ".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    named = {
        name for name in re.findall(r"`([\w.]+)`", first) if name not in ("fused_dispatch", "fused_combine")
    }
    public = set(deep_ep.__all__) | {"indices_to_map"}
    for name in deep_ep.__all__:
        thing = getattr(deep_ep, name)
        if inspect.isclass(thing) and thing is not deep_ep.Unsupported:
            public |= {
                f"{name}.{member}"
                for member in dir(thing)
                if not member.startswith("_")
                and (callable(getattr(thing, member)) or isinstance(getattr(thing, member), property))
            }
    others = {
        f"ElasticBuffer.{name}"
        for name in re.findall(
            r"`(\w+)`", next(line for line in TEXT.splitlines() if "engram_write" in line).split("|", 2)[2]
        )
    }
    assert public - named - others == set(), "missing in the table"
    clients = {
        name
        for name in named
        if name.startswith(("hybrid_ep", "fused"))
        or name
        in (
            "MoELayer",
            "flex",
            "deepep",
            "hybridep",
            "dispatch_tokens",
            "combine_tokens",
            "HybridEPBuffer",
            "Buffer",
            "ElasticBuffer",
        )
    }
    assert named - public - clients == set(), "in the table and not there"
