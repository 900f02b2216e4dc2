"""MkDocs hook: files outside docs/ that pages link to, like exports/README.md, are part of the site, under repository/.

So a relative link is written once, works on GitHub and on the site, and `mkdocs build --strict` finds the broken ones.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
_LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)((?:#[^)\s]*)?\))")  # ](path#anchor)


def on_files(files, config):
    """Adds what pages link to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    found = set()
    while waiting:
        page = waiting.pop()
        for path in linked((ROOT / page).read_text(encoding="utf-8"), page):
            if not path.startswith(("docs/", "../")) and (ROOT / path).is_file() and path not in found:
                found.add(path)
                files.append(File.generated(config, OUTSIDE + path, abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    waiting.append(path)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they have to be in the site."""
    return moved(markdown, page.file.src_uri)


def linked(markdown: str, page: str) -> list[str]:
    """Paths in the repository that a page of that path links to."""
    text = "".join(_CODE.split(markdown)[::2])
    return [posixpath.normpath(posixpath.join(posixpath.dirname(page), link[2])) for link in _LINK.finditer(text)]


def moved(markdown: str, uri: str) -> str:
    """The text of the site's page `uri` with relative links that lead where the repository's do; code stays as it is."""
    outside = uri.startswith(OUTSIDE)
    here = posixpath.dirname(uri.removeprefix(OUTSIDE) if outside else f"docs/{uri}")

    def as_in_site(link):
        path = posixpath.normpath(posixpath.join(here, link[2]))
        target = path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path
        return link[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".") + link[3]

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(as_in_site, part) for part in parts[::2]]
    return "".join(parts)
