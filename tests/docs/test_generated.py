"""The generated pages are up to date, and have every public name once and every environment variable."""

import importlib.util
import inspect
import re
import sys

import doc_pages
import pytest
from doc_pages import ROOT

import moecomm
from moecomm import env


@pytest.fixture
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings():
    """Return [(page, name)] of the API pages."""
    return [
        (page.name, name)
        for page in doc_pages.GENERATED
        for name in re.findall(r"^### `([\w.]+)`$", page.read_text(), re.M)
    ]


def test_pages_are_up_to_date(make_api, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    assert make_api.main() == 0, capsys.readouterr().err


def test_a_stale_page_and_a_missing_docstring_are_found(make_api, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    monkeypatch.setattr(make_api, "DOCS", tmp_path)
    assert make_api.main() == 1
    assert "out of date: api/balance.md, api/buffer.md" in capsys.readouterr().err
    (tmp_path / "quant.py").write_text('"""A module."""\n\ndef undocumented(): ...\n')
    monkeypatch.setattr(make_api, "PACKAGE", tmp_path)
    monkeypatch.setattr(make_api, "exported", dict)
    assert make_api.main() == 1
    assert "no docstring: moecomm.quant.undocumented" in capsys.readouterr().err


def test_every_name_is_on_one_page():
    """All exports of moecomm, with the public members of its classes; inherited ones on the page of the base."""
    names = [name for _, name in headings()]
    assert sorted(names) == sorted(set(names))
    wanted = set()
    for name in moecomm.__all__:
        thing = getattr(moecomm, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            wanted.add(name)
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            inherited = {m for base in thing.__bases__ if base.__name__ in moecomm.__all__ for m in dir(base)}
            wanted |= {
                f"{name}.{member}"
                for member, value in inspect.getmembers(thing)
                if not member.startswith("_") and (callable(value) or isinstance(value, property))
                if member not in inherited or member in vars(thing)
            }
    assert wanted - set(names) == set()


@pytest.mark.parametrize("module", ["balance", "gate", "nn", "overlap", "presets", "quant", "reference"])
def test_modules_for_users_are_documented(module):
    """The public functions and classes that a module defines are documented."""
    thing = getattr(moecomm, module)
    names = getattr(thing, "__all__", None) or [
        name
        for name, value in vars(thing).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (value.__module__.startswith(f"moecomm.{module}") or value.__module__.endswith(f".{module}"))
    ]
    shown = {name.rpartition(".")[2] for _, name in headings()} | {"Started"}
    assert names and set(names) - shown == set()


def test_every_variable_is_on_the_page():
    """docs/environment.md has the table of env.describe(), and other pages name no other variables."""
    text = (ROOT / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| `(MOECOMM_\w+)` \| (?:`([^`]*)`|empty) \| (.*) \|$", text, re.M)
    assert [(n, d, m.replace("\\|", "|")) for n, d, m in rows] == env.describe()
    named = set()
    for page in doc_pages.WRITTEN:
        named |= set(re.findall(r"\bMOECOMM_[A-Z_]+[A-Z]\b", page.read_text()))
    assert named - {name for name, _, _ in rows} - {"MOECOMM_NO_CUDA"} == set()
