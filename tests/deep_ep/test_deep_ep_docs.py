"""docs/deep_ep.md: its code runs as it stands, and its table has every public name of the drop-in."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

from moecomm.integrations import deep_ep

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deep_ep.md").read_text()


def blocks(language):
    """Code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def run(*command, cwd):
    """What a command prints, with this Python first in the path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), OMP_NUM_THREADS="1"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_run(tmp_path):
    """The three commands, but for the installation, with the first program."""
    install, *commands = blocks("sh")[0].splitlines()
    assert install.startswith("pip install") and len(commands) == 2
    (tmp_path / "hello.py").write_text(blocks("python")[0])
    said = run("bash", "-ec", "\n".join(commands), cwd=tmp_path)
    assert len(re.findall(r"rank \d received \d+ tokens", said)) == 2, said


def test_imports_run(tmp_path):
    """The other ways in."""
    run(sys.executable, "-c", blocks("python")[1], cwd=tmp_path)


def test_every_public_name_is_in_the_table():
    """Names of the package, and methods and properties of its classes; and none that is not there."""
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
