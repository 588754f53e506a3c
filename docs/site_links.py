"""Links of the pages to files of the repository: the site has a page for each, with the text of the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[1]
FOLDER = "files"
DATA = {".jsonl", ".svg", ".png"}
"""Files that a browser saves or shows by itself."""


class FileLinks(SphinxTransform):
    """In place of a download of a text, a link to the page that shows it."""

    default_priority = 900

    def apply(self, **options: Any) -> None:
        """Change the page that is being read."""
        for node in list(self.document.findall(addnodes.download_reference)):
            page = Path(self.env.doc2path(self.env.docname))
            path = (page.parent / node["reftarget"]).resolve()
            if path.suffix in DATA or not path.is_file() or not path.is_relative_to(ROOT):
                continue
            name = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
            texts = self.env.__dict__.setdefault("moecomm_texts", set())
            texts.add(name)
            here = os.path.dirname(self.env.docname)  # noqa: PTH120
            link = nodes.reference("", "", *node.children, refuri=os.path.relpath(name, here or ".") + ".html")
            node.replace_self(link)


PAGES = {"](../README.md": "](index.md", "](../CHANGELOG.md": "](changelog.md"}
"""Files above this folder that the site has as pages."""


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Sphinx's event: `source` is changed in place."""
    for link, on_site in PAGES.items():
        source[0] = source[0].replace(link, on_site)


def text_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Sphinx's event: a page for each text that is linked to."""
    highlighter = getattr(app.builder, "highlighter", None)
    for name in sorted(app.env.__dict__.get("moecomm_texts", ())):
        path = ROOT / name.removeprefix(f"{FOLDER}/")
        try:
            language = get_lexer_for_filename(path.name).aliases[0]
        except ClassNotFound:
            language = "text"
        code = highlighter.highlight_block(path.read_text(), language, linenos=False) if highlighter else ""
        title = path.relative_to(ROOT).as_posix()
        yield name, {"title": title, "body": f"<h1>{title}</h1>{code}"}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_transform(FileLinks)
    app.connect("source-read", read)
    app.connect("html-collect-pages", text_pages)
    return {"parallel_read_safe": False}
