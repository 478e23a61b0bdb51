"""The documents as data: pages, code blocks, links and anchors. For tests/docs."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = sorted((ROOT / "docs" / "api").glob("*.md"))
WRITTEN = sorted(ROOT.glob("*.md")) + sorted(p for p in (ROOT / "docs").rglob("*.md") if p not in GENERATED)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
COMMENT = re.compile(r"<!-- ([^>]*) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line, and the comment right before it."""

    language: str
    text: str
    line: int
    mark: str

    def marked(self, kind):
        """Return the text after `kind: ` in the comment, or None if the comment is of another kind."""
        return self.mark.removeprefix(f"{kind}: ") if self.mark.startswith(f"{kind}: ") else None


def name_of(page):
    """Return the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def blocks(page):
    """Return the fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        comment = COMMENT.search(text, 0, match.start())
        body = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
        found.append(
            Block(match[2], body, text.count("\n", 0, match.start()) + 1, comment[1] if comment else "")
        )
    return found


def prose(page):
    """Return the text of a page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def links(page):
    """Yield (target, anchor) of the links and pictures of a page that point into the repository."""
    for to in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", to):
            target, _, anchor = to.partition("#")
            yield target, anchor


def anchors(page):
    """Yield the anchors of a page's headings, in the form of MkDocs and code hosts."""
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())
