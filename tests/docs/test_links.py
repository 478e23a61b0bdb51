"""Links and anchors of the documentation are valid, and every page of docs/ is in the site's navigation."""

import re
import sys

import doc_pages
import pytest
from doc_pages import ROOT, name_of

sys.path.insert(0, str(ROOT / "tools"))
import phrases

PAGES = doc_pages.WRITTEN + doc_pages.GENERATED


def broken(page):
    """Return the invalid links of a page."""
    found = []
    for target, anchor in doc_pages.links(page):
        there = (page.parent / target).resolve() if target else page
        if not there.exists():
            found.append(target)
        elif anchor and there.suffix == ".md" and anchor not in doc_pages.anchors(there):
            found.append(f"{target}#{anchor}")
    return found


@pytest.mark.parametrize("page", doc_pages.WRITTEN, ids=name_of)
def test_pages_use_plain_words(page):
    """No page has a phrase of tools/phrases.py, which lists replacements."""
    assert phrases.hits(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#two) [c](none.md) `[d](none)` [e](https://none)\n")
    assert broken(page) == ["#two", "none.md"]


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"([\w/]+\.md)\b", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    pages = {name_of(p).removeprefix("docs/") for p in PAGES if p.is_relative_to(ROOT / "docs")}
    from_root = {p.name.lower() for p in ROOT.glob("*.md") if p.name != "README.md"}
    assert len(nav) == len(set(nav))
    assert set(nav) == pages | from_root


def test_the_index_leads_to_every_page():
    """Each page for readers is one link away from docs/index.md; the API has its own index."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target, _ in doc_pages.links(index)}
    pages = [p for p in doc_pages.WRITTEN if p not in (index, ROOT / "README.md")]
    assert [name_of(p) for p in pages if p not in linked] == []


def test_the_architecture_has_every_folder():
    """The table and the picture of docs/architecture.md have all folders of csrc."""
    folders = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()}
    table = re.findall(r"^\| `csrc/(\w+)/`", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    picture = re.findall(r">(\w+)/(?:\w+)?<", (ROOT / "docs" / "layers.svg").read_text())
    assert folders - set(table) == set() and folders - set(picture) == set()
