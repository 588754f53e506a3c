"""Every local link, picture, style and script of the built site leads to something, anchors included.

python docs/check_site.py build/docs
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

REFERENCES = ("href", "src")


class Page(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """HTMLParser's call for each tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in REFERENCES and value:
                self.references.add(value)


def broken(site: Path) -> list[str]:
    """Each reference that leads nowhere, behind the page that has it."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        for reference in sorted(page.references):
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            # Furo's link to the top of a page has an empty anchor; scripts make anchors of their own.
            has_anchor = not anchor or target not in pages or anchor in pages[target].anchors
            if not target.exists() or not has_anchor:
                problems.append(f"{path.relative_to(site.resolve())}: {reference}")
    return problems


def main() -> int:
    """Print what is broken. Returns the exit status."""
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        print(f"{site} has no index.html, expected a built site: make docs")
        return 2
    problems = broken(site)
    print("\n".join(problems) or f"{site}/index.html: every link leads somewhere")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
