"""`python -m moecomm COMMAND`: each command is a module with arguments(parser) and main(args) -> exit status."""

import argparse
import importlib
import sys

COMMANDS = {
    "calibrate": ("moecomm.calibrate", "measures this machine for the sim world, and checks its predictions"),
    "explore": ("moecomm.explore", "random schedules of small simulated worlds: hunts deadlocks and reordering bugs"),
    "info": ("moecomm.info", "version, worlds and engines that are available here, topology as seen"),
    "plan": ("moecomm.planner.cli", "predict what a cluster would do with a model's tokens"),
    "replay": ("moecomm.replay", "run a recording again and compare what moved"),
    "trace": ("moecomm.trace", "a timeline of roles, from the sim or the cpu world, for ui.perfetto.dev"),
}


def main(argv=None):
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m moecomm", description="Mixture-of-Experts token exchange")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, meaning) in COMMANDS.items():
        commands.add_parser(name, help=meaning, add_help=False)
    name = parser.parse_args((sys.argv[1:] if argv is None else argv)[:1]).command
    module = importlib.import_module(COMMANDS[name][0])
    own = argparse.ArgumentParser(prog=f"python -m moecomm {name}", description=COMMANDS[name][1])
    module.arguments(own)
    return module.main(own.parse_args((sys.argv[1:] if argv is None else argv)[1:])) or 0


if __name__ == "__main__":
    sys.exit(main())
