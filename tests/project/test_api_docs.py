"""docs/api.md names everything that is public, and everything that is public has a docstring."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "make_api.py"


@pytest.fixture
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_documented(make_api, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    assert make_api.main() == 0, capsys.readouterr().err


def test_a_missing_name_and_a_missing_docstring_are_found(make_api, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["make_api.py", "--check"])
    text = make_api.TARGET.read_text()
    monkeypatch.setattr(make_api, "TARGET", tmp_path / "api.md")
    make_api.TARGET.write_text(text.replace("#### `Buffer.combine(", "#### `Buffer.recombine("))
    assert make_api.main() == 1
    assert "moecomm.Buffer.combine" in capsys.readouterr().err
    (tmp_path / "new.py").write_text('"""A module."""\n\ndef undocumented(): ...\n')
    monkeypatch.setattr(make_api, "PACKAGE", tmp_path)
    monkeypatch.setattr(make_api, "exported", dict)
    assert make_api.main() == 1
    assert "no docstring: moecomm.new.undocumented" in capsys.readouterr().err
