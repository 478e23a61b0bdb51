"""`moecomm COMMAND`, or `python -m moecomm COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from .errors import InvalidArgument, MoecommError

COMMANDS = {
    "bench": (None, "the benchmarks, each a command of its own"),
    "calibrate": (
        "moecomm.sim.calibrate",
        "measures this machine for the sim world, and checks its predictions",
    ),
    "deep-ep-path": (
        "moecomm.integrations.deep_ep.install",
        "the folder that makes `import deep_ep` import moecomm, for PYTHONPATH",
    ),
    "explore": (
        "moecomm.sim.explore",
        "random schedules of small simulated worlds: hunts deadlocks and reordering bugs",
    ),
    "info": ("moecomm.info", "version, worlds and engines that are available here, topology as seen"),
    "plan": ("moecomm.sim.planner.cli", "predict what a cluster would do with a model's tokens"),
    "replay": ("moecomm.tracing.replay", "run a recording again and compare what moved"),
    "trace": (
        "moecomm.tracing.trace",
        "a timeline of roles, from the sim or the cpu world, for ui.perfetto.dev",
    ),
}


def run(prog, description, commands, argv=None):
    """Run one of {name: (module, meaning)}; returns its exit status. The module finds its own name in args.command."""
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
    except InvalidArgument as refused:  # what argparse could not know, told as argparse tells
        own.error(str(refused))
    except MoecommError as failed:
        print(f"{own.prog}: {failed}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # none of a file that an option named
            raise
        own.error(str(error))


def _bench(argv):
    """Run the benchmarks: part of the installed package, or beside it in a checkout."""
    name = "moecomm.bench"
    if importlib.util.find_spec(name) is None:
        name, root = "bench", str(Path(__file__).resolve().parent.parent)
        if not (Path(root) / name / "__main__.py").exists():
            sys.exit(
                "moecomm bench: this installation has no benchmarks; expected the folder bench/ of a checkout, or a wheel of moecomm"
            )
        sys.path.insert(0, root)
    sys.argv = [f"{sys.argv[0]} bench", *argv]  # a benchmark starts its ranks with the arguments it was given
    return importlib.import_module(f"{name}.__main__").main(argv)


def main(argv=None):
    """Run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    return run("python -m moecomm", "Mixture-of-Experts token exchange", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
