"""Every code block of the documentation runs, and prints the output on the page.

python blocks of a page run in order in one fresh process. console blocks run afterwards, in a separate folder per
page: lines that start with `$ ` are commands, the lines below them are their output. A comment before a block changes
this:

<!-- output -->          a text block: the output of the python block before it
<!-- file: NAME -->      a python block: it is saved under this name for console blocks; a file with that name in the
                         repository must be equal
<!-- any order -->       a console block: its output may have its lines in any order
<!-- not run: REASON --> the block does not run; the reasons are listed below

In an output, `...` stands for any text within a line, and a line with only `...` for any number of lines.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import doc_pages
import doc_runner
import pytest
from doc_pages import ROOT, name_of

REASONS = {
    "needs a GPU",
    "needs a cluster",
    "needs a slow rank",
    "needs processes",
    "needs ranks that die",
    "needs root",
    "installs packages",
    "takes minutes",
    "starts a shell job",
}
LANGUAGES = {"python", "console", "text"}
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
PAGES = [page for page in doc_pages.WRITTEN if doc_pages.blocks(page)]


def runs(block):
    """Tell whether a block is run."""
    return block.marked("not run") is None


def commands(block):
    """Return [(command, expected output or None)] of a console block."""
    found = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append([line[2:], []])
        elif found and found[-1][0].endswith("\\") and not found[-1][1]:
            found[-1][0] = found[-1][0][:-1] + line.strip()
        elif found:
            found[-1][1].append(line)
    return [(command, "\n".join(lines).strip("\n") if lines else None) for command, lines in found]


def matches(expected, said, any_order=False):
    """Tell whether an output matches the expected one, in which `...` stands for any text."""
    wanted, got = expected.strip().splitlines(), said.strip().splitlines()
    if any_order:
        wanted, got = sorted(wanted), sorted(got)
    lines = [
        r"(?:.*\n)*?" if line.strip() == "..." else r"[^\n]*?".join(map(re.escape, line.split("..."))) + r"\n"
        for line in wanted
    ]
    return re.fullmatch("".join(lines), "".join(f"{line.rstrip()}\n" for line in got)) is not None


def environment():
    """The environment variables in which `python` and `moecomm` are those of this environment and checkout."""
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    return os.environ | SETTINGS | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


def execute(command, folder):
    """Return the output of a shell command; raise an error if it fails."""
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def execute_loaded(argv, folder, processes):
    """Run a command in a process that has already loaded torch and moecomm, which takes most of the time."""
    out = folder / "out.txt"
    process = processes.Process(target=doc_runner.run, args=(argv, str(folder), environment(), str(out)))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    said = out.read_text() if out.exists() else ""
    assert process.exitcode == 0, f"{argv}\n{said[-6000:]}"
    return said


def run_python(page, folder, processes):
    """Run the python blocks; return the differences from the expected output, by line."""
    wanted, expected = [], {}
    for block in doc_pages.blocks(page):
        if block.language == "python" and runs(block) and block.marked("file") is None:
            wanted.append((block.line, block.text))
        elif block.mark == "output":
            expected[len(wanted) - 1] = block
    if not wanted:
        return
    (folder / "blocks.json").write_text(json.dumps(wanted))
    execute_loaded(["blocks", name_of(page)], folder, processes)
    said = json.loads((folder / "outputs.json").read_text())
    for at, block in expected.items():
        assert matches(block.text, said[at]), f"{name_of(page)}:{block.line}: printed\n{said[at]}"


def run_console(page, folder, processes):
    """Run the commands, and compare their output."""
    for block in doc_pages.blocks(page):
        name = block.marked("file")
        if name is not None and "/" not in name:
            (folder / name).write_text(block.text)
    exported = []  # `export` applies to the rest of the page
    for block in doc_pages.blocks(page):
        if block.language == "console" and runs(block):
            for command, expected in commands(block):
                words = shlex.split(command)
                if not exported and words[0] in ("python", "moecomm") and not set(command) & set("$&|<>;="):
                    said = execute_loaded(words, folder, processes)
                else:
                    said = execute("\n".join([*exported, command]), folder)
                if command.startswith("export "):
                    exported.append(command)
                assert expected is None or matches(expected, said, block.mark == "any order"), (
                    f"{name_of(page)}:{block.line}: {command} printed\n{said}"
                )


@pytest.fixture(scope="session")
def pages(request, tmp_path_factory, processes):
    """Run all pages, two at a time; return {page: outcome}. Most of the time is needed to start processes."""

    def run(page):
        folder = folders[page]
        (folder / "examples").symlink_to(ROOT / "examples")
        run_python(page, folder, processes)
        run_console(page, folder, processes)

    wanted = {item.callspec.params["page"] for item in request.session.items if "runs_as_it" in item.name}
    folders = {
        page: tmp_path_factory.mktemp(page.stem) for page in PAGES if page in wanted
    }  # not usable by threads
    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(run, page) for page in PAGES if page in wanted}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_runs_as_it_stands(page, pages):
    pages[page].result()


def left_out():
    """Return (place, reason, block) of the blocks that do not run."""
    for page in PAGES:
        for block in doc_pages.blocks(page):
            if not runs(block):
                yield f"{name_of(page)}:{block.line}", block.marked("not run"), block


def test_blocks_that_do_not_run_say_why(record_property):
    """Each such block has a reason, and the make targets and files in it exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for where, reason, block in left_out():
        print(f"{where}: not run: {reason}")
        record_property("not run", f"{where}: {reason}")
        assert reason in REASONS, where
        for command, _ in commands(block):
            words = shlex.split(command, comments=True)
            if words[0] == "make":
                asked = {w for w in words[1:] if "=" not in w and not w.startswith("build/")}
                assert asked <= targets, f"{where}: {command}"
            files = [w for w in words if w.endswith(".py") and "/" in w]
            assert [f for f in files if not (ROOT / f).exists()] == [], f"{where}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_form_that_can_run(page):
    """A block has a known language, commands after `$ `, and equals the file that it names."""
    for block in doc_pages.blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in LANGUAGES, where
        assert block.language != "console" or block.text.startswith("$ "), where
        name = block.marked("file")
        if name is not None and "/" in name:
            assert block.text == (ROOT / name).read_text(), f"{where} differs from {name}"


@pytest.mark.parametrize("page", [p for p in doc_pages.WRITTEN if p.name != "errors.md"], ids=name_of)
def test_code_is_fenced(page):
    """No code block is only indented; docs/errors.md indents the texts of errors."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r"(?<=\n\n) {4}(?![-*\d|])\S.*", text) == []


def test_a_wrong_page_is_found(tmp_path, processes):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint('a', 1)\n```\n\n<!-- output -->\n```text\na ...\n```\n\n```console\n$ echo b\nb\n```\n"
    )
    run_python(page, tmp_path, processes)
    run_console(page, tmp_path, processes)
    page.write_text(page.read_text().replace("$ echo b", "$ echo c").replace("a ...", "b ..."))
    with pytest.raises(AssertionError, match=r"printed\s+a 1"):
        run_python(page, tmp_path, processes)
    with pytest.raises(AssertionError, match="echo c printed"):
        run_console(page, tmp_path, processes)
    page.write_text("```python\nraise ValueError('of line 2')\n```\n")
    with pytest.raises(AssertionError, match="line 2"):
        run_python(page, tmp_path, processes)


def test_outputs_are_compared_line_by_line():
    assert matches("a\n...\nb 1... c", "a\nx\ny\nb 12 c\n") and matches("a\n...\nb", "a\nb")
    assert not matches("a\nb", "b\na") and matches("a\nb", "b\na", any_order=True)
    assert not matches("a ... c", "a\nc") and not matches("a", "a\nb")
