"""Blocks of code that are parts of a program, on the site: each says of which, and how many there are.

In a page a part begins with ```python program=NAME. The parts of a name run in their order and share their names;
other viewers of Markdown do not show what stands behind the language.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from sphinx.application import Sphinx

PART = re.compile(r"^```(?P<language>\w+) program=(?P<name>[\w-]+)$", re.MULTILINE)


def with_captions(source: str) -> str:
    """The page with a caption over each part of a program."""
    counts = Counter(match["name"] for match in PART.finditer(source))
    seen: Counter[str] = Counter()

    def directive(match: re.Match[str]) -> str:
        name = match["name"]
        seen[name] += 1
        caption = f"program {name}, part {seen[name]} of {counts[name]}"
        return f"```{{code-block}} {match['language']}\n:caption: {caption}\n"

    return PART.sub(directive, source)


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Sphinx's event: `source` is changed in place."""
    source[0] = with_captions(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
