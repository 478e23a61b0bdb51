"""Command lines: an invalid number, path or name gives status 2 and one line with the option and the expectation."""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from odd_values import EVERY, label

import bench.__main__
import moecomm
from bench import routing
from bench.cases import Case
from moecomm import __main__ as command
from moecomm import clusters, options, presets
from moecomm.planner.question import ask

COMMANDS = [("moecomm", name, module) for name, (module, _) in command.COMMANDS.items() if module] + [
    ("bench", name, module) for name, (module, _) in bench.__main__.COMMANDS.items()
]
FREE = {
    "--cluster",
    "--model",
    "--device",
    "--tag",
    "commit",
    "path",
    "--ceiling",
}  # names that are checked later, paths with their own readers
MAIN = {"moecomm": command.main, "bench": bench.__main__.main}


def actions(module, name):
    parser = argparse.ArgumentParser(prog=name, exit_on_error=False)
    importlib.import_module(module).arguments(parser)
    return parser, [a for a in parser._actions if not isinstance(a, argparse._HelpAction) and a.nargs != 0]


@pytest.mark.parametrize("where,name,module", COMMANDS, ids=str)
def test_every_option_checks_its_value(where, name, module, capsys):
    """Every option with a value has a type of moecomm.options, or choices.

    An invalid value is refused with the option's name.
    """
    _parser, found = actions(module, name)
    for action in found:
        option = action.option_strings[-1] if action.option_strings else action.dest
        if option in FREE:
            continue
        assert action.choices or getattr(action.type, "__module__", None) == options.__name__, (
            f"{where} {name} {option} takes anything"
        )
        numeric = action.type in (
            options.positive,
            options.count,
            options.ranks,
            options.tokens,
            options.above_zero,
            options.share,
            options.positives,
            options.sizes,
            options.numbers,
            options.geometries,
        )
        for text in ["\0", "/nonsuch/a/b"] + numeric * [
            "nan",
            "-inf",
            "-1",
            "x",
            "",
            "1e400",
            "9" * 5000,
            "0x10",
            "None",
            "1,,2",
            "é",
        ]:
            if text == "/nonsuch/a/b" and action.type is options.folder_to_write:
                continue  # root can make that folder
            given = [f"{option}={text}"] if action.option_strings else [text]
            with pytest.raises((SystemExit, argparse.ArgumentError)) as refused:
                MAIN[where]([name, *given])
            said = capsys.readouterr().err
            assert (
                refused.value.code == 2
                and f"{'/'.join(action.option_strings) or option}" in said
                and len(said) < 20000
            ), said[-300:]


@pytest.mark.parametrize(
    "where,line,expected",
    [
        ("moecomm", "trace {folder}", "out"),
        ("moecomm", "trace {missing}/t.json", "out"),
        ("moecomm", "trace {new} --ranks 6 --ranks-per-node 4", "--ranks-per-node"),
        (
            "moecomm",
            "trace {new} --ranks 65535 --ranks-per-node 1 --tokens 16777216",
            "--ranks times --tokens",
        ),
        ("moecomm", "trace {new} --model x", "model"),
        ("moecomm", "trace {new} --model __doc__", "model"),
        ("moecomm", "trace {new} --cluster x", "cluster"),
        ("moecomm", "trace {new} --cluster {binary}.toml", "cluster"),
        ("moecomm", "trace {new} --world cpu --ranks 4096", "--ranks"),
        ("moecomm", "trace {new} --ranks 3 --ranks-per-node 3", "num_experts"),
        ("moecomm", "plan --model x", "model"),
        ("moecomm", "plan --model ModelShape", "model"),
        ("moecomm", "plan --cluster {folder}.toml", "cluster"),
        ("moecomm", "plan --cluster {empty}.toml", "cluster"),
        ("moecomm", "plan --ep 65535", "ep"),
        ("moecomm", "plan --tokens 16777216", "tokens"),
        ("moecomm", "plan --sms 7", "num_sms"),
        ("moecomm", "plan --slots-per-rank 65535", "slots_per_rank"),
        ("moecomm", "plan --routing {folder}", "recording"),
        ("moecomm", "plan --routing {text} --quick", "routing"),
        ("moecomm", "plan --routing {missing}", "--routing"),
        ("moecomm", "plan --html {folder}", "--html"),
        ("moecomm", "replay {missing}", "recording"),
        ("moecomm", "replay {text}", "recording"),
        ("moecomm", "replay {folder}", "recording"),
        ("moecomm", "replay {hollow}", "recording"),
        ("moecomm", "replay {folder} --ranks 0", "--ranks"),
        ("moecomm", "calibrate --out {folder}", "--out"),
        ("moecomm", "calibrate --ranks 60000", "--ranks"),
        ("moecomm", "nonsense", "invalid choice"),
        ("moecomm", "", "required"),
        ("bench", "sim --cluster {binary}.toml", "cluster"),
        ("bench", "precision --embeddings {binary}", "embedding"),
        ("bench", "precision --embeddings {folder}", "--embeddings"),
        ("bench", "precision --embeddings {text}.npy", "header"),
        ("bench", "decode --geometries 1x8,3x3", "--geometries"),
        ("bench", "balance --cases Q", "--cases"),
        ("bench", "dispatch --json {folder}", "--json"),
        ("bench", "suite --output {text}", "--output"),
        ("bench", "roundtrip --masked 2", "--masked"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_odd_lines(where, line, expected, tmp_path, capsys):
    made = {
        name: tmp_path / name for name in ("folder", "missing", "new", "text", "binary", "empty", "hollow")
    }
    for suffix in ("", ".toml", ".npy"):
        (tmp_path / f"text{suffix}").write_text("some words\n")
        (tmp_path / f"binary{suffix}").write_bytes(bytes(range(256)) * 4)
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "rank-00000.000.npz").write_bytes(b"")
    with pytest.raises(SystemExit) as refused:
        MAIN[where](line.format(**made).split())
    said = capsys.readouterr()
    assert (
        refused.value.code == 2 and expected in said.err.splitlines()[-1] and "Traceback" not in said.err
    ), said.err
    assert not (tmp_path / "new").exists()


def test_permissions():
    """Unwritable folders and unreadable files.

    Tests under root use another user, because root may read and write everything.
    """
    home = tempfile.TemporaryDirectory()  # other users cannot enter pytest's folders
    tmp_path = Path(home.name)
    tmp_path.chmod(0o755)
    (tmp_path / "open").write_text("words")
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "secret").write_text("words")
    (tmp_path / "secret").chmod(0)
    read, write = os.pipe()
    if os.fork() == 0:
        refused = 0
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            options.file_to_read(str(tmp_path / "open"))
            for check, path in (
                (options.file_to_write, "closed/t.json"),
                (options.folder_to_write, "closed/new"),
                (options.file_to_read, "secret"),
                (options.file_to_write, "secret"),
                (options.source("uniform"), "secret"),
            ):
                try:
                    check(str(tmp_path / path))
                except argparse.ArgumentTypeError:
                    refused += 1
        finally:
            os.write(write, bytes([refused]))
            os._exit(0)
    os.wait()
    assert os.read(read, 1) == bytes([5])
    home.cleanup()


@pytest.mark.parametrize(
    "name,make",
    [
        ("a.npy", lambda f: f.write_bytes(b"")),
        ("a.npy", lambda f: f.write_bytes(b"\x93NUMPY\1\0v\0{'descr'")),
        ("a.npy", lambda f: np.save(f, np.zeros((4, 2)))),
        ("a.npy", lambda f: np.save(f, np.full((4, 2), 8))),
        ("a.npy", lambda f: np.save(f, np.full((4, 2), -2))),
        ("a.npy", lambda f: np.save(f, np.zeros((4, 2), int))),
        ("a.npy", lambda f: np.save(f, np.zeros((4, 3), int))),
        ("a.npy", lambda f: np.save(f, np.zeros((0, 2), int))),
        ("a.npy", lambda f: np.save(f, np.array([{}]), allow_pickle=True)),
        ("a.npz", lambda f: np.savez(f, picks=np.zeros((4, 2), int))),
        ("a.npz", lambda f: np.savez(f, ids=[[0, 1]], weights=[[0.5]])),
        ("a.npz", lambda f: np.savez(f, ids=[[0, 1]], weights=[["x", "y"]])),
        ("a.npz", lambda f: f.write_bytes(b"PK\3\4")),
        ("a.txt", lambda f: f.write_bytes(b"")),
        ("rec", lambda f: f.mkdir()),
    ],
)
def test_routing_from_odd_files(name, make, tmp_path):
    make(tmp_path / name)
    case = Case(ranks_per_node=2, experts=8, top_k=2, tokens=4, hidden=64, routing=str(tmp_path / name))
    with pytest.raises(moecomm.InvalidArgument, match=f"{name}|contains no rank"):
        routing.make_inputs(case, 0)


def test_routing_from_files(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.array([[0, 7], [3, -1]]), weights=np.array([[1.0, 0.0], [0.5, 0.5]]))
    inputs = routing.make_inputs(
        Case(ranks_per_node=1, experts=8, top_k=2, tokens=2, hidden=64, routing=str(tmp_path / "a.npz")), 0
    )
    assert inputs.ids.tolist() == [[0, 7], [3, -1]] and inputs.weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    "argument",
    [
        "model",
        "cluster",
        "ranks",
        "tokens",
        "routing",
        "decode",
        "quant",
        "num_sms",
        "top_groups",
        "slots_per_rank",
    ],
)
def test_odd_questions(argument):
    """The planner from Python: arguments are valid, or refused by name."""
    for value in EVERY:
        try:
            ask(**(dict(model="deepseek-v3", cluster="h800", ranks=16, tokens=8) | {argument: value}))
        except moecomm.InvalidArgument as error:
            assert {"ranks": "ep"}.get(argument, argument) in str(error), f"{label(value)}: {error}"


@pytest.mark.parametrize(
    "function",
    [
        clusters.load,
        presets.shape_of,
        moecomm.record.load,
        lambda v: clusters.Hardware(put=v),
        lambda v: clusters.Hardware(rail_rate=v),
    ],
    ids=["cluster", "model", "recording", "put", "rail_rate"],
)
def test_odd_names(function):
    refused = 0
    for value in EVERY:
        try:
            function(value)
        except moecomm.InvalidArgument:
            refused += 1
    assert refused > len(EVERY) / 2
