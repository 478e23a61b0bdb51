"""`moecomm COMMAND`, or `python -m moecomm COMMAND`.

Each command is a module with arguments(parser) and main(args) -> exit status.
"""

from __future__ import annotations

from typing import Any

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from .errors import InvalidArgument, MoecommError

COMMANDS = {
    "bench": (None, "run benchmarks; each is a separate command"),
    "calibrate": (
        "moecomm.sim.calibrate",
        "measure this machine for the sim world, and check its predictions",
    ),
    "deep-ep-path": (
        "moecomm.integrations.deep_ep.install",
        "print the folder for PYTHONPATH that makes `import deep_ep` import moecomm",
    ),
    "explore": (
        "moecomm.sim.explore",
        "run random schedules of small simulated worlds, to find deadlocks and reordering bugs",
    ),
    "info": ("moecomm.info", "print the version, the available worlds and engines, and the topology"),
    "plan": ("moecomm.sim.planner.cli", "predict the times of a model's dispatch and combine on a cluster"),
    "replay": ("moecomm.tracing.replay", "run a recording again and compare its traffic"),
    "trace": (
        "moecomm.tracing.trace",
        "write a timeline of roles of the sim or cpu world, for ui.perfetto.dev",
    ),
}


def run(prog: str, description: str, commands: Any, argv: list[str] | None = None) -> Any:
    """Run one of {name: (module, description)}; return its exit status.

    The module finds its own name in args.command.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=prog, description=description)
    choices = parser.add_subparsers(dest="command", required=True)
    for name, (_, meaning) in commands.items():
        choices.add_parser(name, help=meaning, add_help=False)
    name = parser.parse_args(argv[:1]).command
    module = importlib.import_module(commands[name][0])
    own = argparse.ArgumentParser(prog=f"{prog} {name}", description=commands[name][1])
    module.arguments(own)
    own.set_defaults(command=name)
    args = own.parse_args(argv[1:])
    try:
        return module.main(args) or 0
    except InvalidArgument as refused:  # argparse cannot check this; report it in the same form
        own.error(str(refused))
    except MoecommError as failed:
        print(f"{own.prog}: {failed}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # not an error of a file named by an option
            raise
        own.error(str(error))


def _bench(argv: list[str]) -> Any:
    """Run the benchmarks, which are part of the installed package, or next to it in a checkout."""
    name = "moecomm.bench"
    if importlib.util.find_spec(name) is None:
        name, root = "bench", str(Path(__file__).resolve().parent.parent)
        if not (Path(root) / name / "__main__.py").exists():
            sys.exit(
                "moecomm bench: this installation has no benchmarks; expected the folder bench/ of a checkout, or "
                "a wheel of moecomm"
            )
        sys.path.insert(0, root)
    sys.argv = [f"{sys.argv[0]} bench", *argv]  # a benchmark starts its ranks with these arguments
    return importlib.import_module(f"{name}.__main__").main(argv)


def main(argv: list[str] | None = None) -> Any:
    """Run one command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    return run("python -m moecomm", "Mixture-of-Experts token exchange", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
