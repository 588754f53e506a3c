"""Every program of the documentation runs as printed and gives what the page says; figures and links exist.

- ```python: a program, which runs alone. ```python program=NAME: a part of one; the parts of a page that have the same
  name run in their order and share their names. The site shows the name over each part.
- What a block prints is the ```text block right below it, if there is one. A line that is an expression with a comment
  behind it has that value.
- ```sh: the lines that begin with `python -m moecomm topology` or `plan` are run; what they print is the ```text block
  below.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from moecomm.cli import main

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
INFO = re.compile(r"(?P<language>\w*)(?: program=(?P<program>[\w-]+))?|\{[\w-]+\}.*")
"""What may stand behind the opening marks; in braces, a directive of the site."""
COMMANDS = ("python -m moecomm topology ", "python -m moecomm plan ")


class Block(NamedTuple):
    """A block of code and the ```text that is right below it."""

    language: str
    program: str | None
    code: str
    text: str | None
    line: int


def blocks(page: Path) -> Iterator[Block]:
    source = page.read_text()
    found = list(BLOCK.finditer(source))
    for match, following in zip_longest(found, found[1:]):
        below = following is not None and following[1] == "text" and not source[match.end() : following.start()].strip()
        text = following[2] if below and following is not None else None
        info = INFO.fullmatch(match[1])
        assert info, f"{page.name}: {match[1]}"
        yield Block(info["language"] or "", info["program"], match[2], text, source.count("\n", 0, match.start()) + 2)


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    """Run the block and return what it prints. Raises AssertionError where a value is not what its comment says."""
    lines = block.code.splitlines()
    printed = StringIO()
    with redirect_stdout(printed):
        for statement in ast.parse(block.code).body:
            ast.increment_lineno(statement, block.line - 1)
            last = lines[statement.end_lineno - block.line]  # type: ignore[operator]
            comment = last.encode()[statement.end_col_offset :].decode().strip()
            if isinstance(statement, ast.Expr) and comment:
                value = eval(compile(ast.Expression(statement.value), str(page), "eval"), names)
                assert f"# {value!r}" == comment, f"{page.name}:{statement.end_lineno}"
            else:
                exec(compile(ast.Module([statement], []), str(page), "exec"), names)
    return printed.getvalue()


def run_commands(block: Block) -> str:
    printed = StringIO()
    with redirect_stdout(printed):
        for line in block.code.splitlines():
            if line.startswith(COMMANDS):
                assert main(shlex.split(line, comments=True)[3:]) == 0
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    programs: dict[str, dict[str, Any]] = {}
    for block in blocks(page):
        # A program finds no file that another one has written.
        folder = tmp_path / (block.program or f"line-{block.line}")
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        if block.language == "python":
            alone: dict[str, Any] = {"__name__": page.stem}
            names = alone if block.program is None else programs.setdefault(block.program, alone)
            printed = run_python(block, page, names)
        elif block.language == "sh" and any(command in block.code for command in COMMANDS):
            printed = run_commands(block)
        else:
            continue
        assert printed == (block.text or ""), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_parts_of_programs(page: Path) -> None:
    counts = Counter(block.program for block in blocks(page) if block.program)
    assert 1 not in counts.values(), f"a program of one part needs no name: {counts}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    entries = {line for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in block.splitlines()}
    assert {page.stem for page in PAGES} - {"index"} <= entries


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links(page: Path) -> None:
    headings = {path: anchors(path) for path in [*PAGES, ROOT / "README.md"]}
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in headings[target], link


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_knows_all_modules_that_its_pages_ask_for() -> None:
    source = (ROOT / "docs/site_docstrings.py").read_text()
    modules = set(re.findall(r'"(moecomm[\w.]*)",', source.partition("MODULES = (")[2].partition(")")[0]))
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.rst"))
    assert set(re.findall(r"public-names:: ([\w.]+)", pages)) == modules
