"""Hooks of MkDocs: pages that lie outside docs/, and links that leave it.

CONTRIBUTING.md, CHANGELOG.md and SECURITY.md stand at the root of the repository, where hosts look for
them. The site shows them as pages. Links to source files become plain text, because the site has no copy of
the sources.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    name: f"{name.removesuffix('.md').lower()}.md"
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def target_of(folder, link):
    """The page of the site that a link of a file in `folder` (relative to the root) leads to; None where
    there is none.
    """
    path = posixpath.normpath(posixpath.join(folder, link))
    if path in PAGES:
        return PAGES[path]
    inside = path.removeprefix("docs/")
    return inside if inside != path and (ROOT / path).is_file() and not path.endswith(".py") else None


def rewrite(text, folder, page):
    """`text` of a file in `folder`, its links as they must be on the site's page `page`."""

    def link(match):
        label, to, anchor = match.groups()
        if re.match(r"[a-z]+:", to):
            return match[0]
        target = target_of(folder, to)
        if target is None:
            return label if (ROOT / folder / to).exists() else match[0]
        return f"[{label}]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{anchor or ''})"

    return LINK.sub(link, text)


def on_files(files, config):
    """Adds the pages of the repository's root."""
    for name, page in PAGES.items():
        if (ROOT / name).exists():
            files.append(File.generated(config, page, content=rewrite((ROOT / name).read_text(), "", page)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites links that leave docs/."""
    uri = page.file.src_uri
    if uri in PAGES.values():
        return markdown
    return rewrite(markdown, posixpath.join("docs", posixpath.dirname(uri)), uri)
