"""MkDocs hook: files outside docs/ that pages link to, like exports/README.md, are part of the site, under repository/.

So a relative link is written once, works on GitHub and on the site, and `mkdocs build --strict` finds the broken ones.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
_LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)((?:#[^)\s]*)?\))")  # ](path#anchor)


def on_files(files, config):
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    found = set()
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            path = os.path.relpath(target, ROOT).replace(os.sep, "/")
            if not path.startswith(("docs/", "..")) and target.is_file() and path not in found:
                found.add(path)
                files.append(File.generated(config, OUTSIDE + path, abs_src_path=str(target)))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they have to be in the site."""
    here = _in_repository(page.file.src_uri)

    def moved(link):
        target = os.path.relpath((ROOT / here).parent / link[2], ROOT).replace(os.sep, "/")
        uri = target.removeprefix("docs/") if target.startswith("docs/") else OUTSIDE + target
        return link[1] + os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".").replace(os.sep, "/") + link[3]

    return _LINK.sub(moved, markdown)


def _in_repository(uri: str) -> str:
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}"


def _targets(page: Path):
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        yield Path(os.path.normpath(page.parent / link[2]))
