"""docs/architecture.md and the contracts of import-linter say the same as the import statements."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

grimp = pytest.importorskip("grimp")
sys.path.insert(0, str(ROOT / "docs"))

import architecture_figure  # noqa: E402
import test_draw  # noqa: E402

PAGE = (ROOT / "docs" / "architecture.md").read_text()
MOST_LINES = 1500


class Reading(NamedTuple):
    """A row of the reading path."""

    file: Path
    names: list[str]
    """Functions, classes and methods; empty: the whole file."""
    stated: int
    """Lines, as the page says."""

    def lines(self) -> int:
        source = self.file.read_text()
        if not self.names:
            return len(source.splitlines())
        return sum(map(size, (definition(ast.parse(source), name) for name in self.names)))


def definition(tree: ast.Module, name: str) -> Any:
    node: Any = tree
    for step in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == step)
    return node


def size(node: Any) -> int:
    return node.end_lineno - min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) + 1


def reading_path() -> Iterator[Reading]:
    section = PAGE.partition("## The reading path")[2].partition("\n## ")[0]
    for path, names, stated in re.findall(r"^\| \[.*?\]\((\S+)\) \| (.*?) \| (\d+) \|", section, re.MULTILINE):
        yield Reading(ROOT / "docs" / path, re.findall(r"`(.*?)`", names), int(stated))


def test_the_reading_path_is_short() -> None:
    assert len(list(reading_path())) > 10
    assert sum(reading.lines() for reading in reading_path()) <= MOST_LINES


@pytest.mark.parametrize(
    "reading", list(reading_path()), ids=lambda reading: f"{reading.file.name} {reading.names[:1]}"
)
def test_the_stated_lengths_are_about_right(reading: Reading) -> None:
    assert abs(reading.lines() - reading.stated) <= 10 + reading.stated / 10, f"now {reading.lines()} lines"


def contracts() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {contract["name"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


CORE_CONTRACT = contracts()["the core imports no wing"]


def test_the_map_and_the_contract_have_the_same_wings() -> None:
    for module in grimp.build_graph("moecomm").modules - set(architecture_figure.FACES):
        is_wing = any(fnmatchcase(module, pattern) for pattern in CORE_CONTRACT["forbidden_modules"])
        is_core = any(fnmatchcase(module, pattern) for pattern in CORE_CONTRACT["source_modules"])
        room = architecture_figure.room_of(module)
        if room in architecture_figure.WINGS:
            assert is_wing or module == "moecomm.__main__", f"{module} is in {room.name}, but no wing in pyproject.toml"
        else:
            assert is_core and not is_wing, f"{module} is in {room.name}, but not of the core in pyproject.toml"


def test_one_file_of_the_core_is_exempt() -> None:
    """What else is ignored are the imports of wings."""
    importers = set()
    for edge in CORE_CONTRACT["ignore_imports"]:
        importer, _, imported = edge.partition(" -> ")
        if imported == "moecomm.**":
            assert importer in CORE_CONTRACT["forbidden_modules"]
        else:
            assert architecture_figure.room_of(imported).name == "gpu"
            importers.add(importer)
    assert importers == {"moecomm.gating.ops"}


def test_without_a_gpu_no_launcher_is_needed() -> None:
    pytest.importorskip("torch")
    program = """
import sys, torch, moecomm
for name in ("cuda", "cuda_rows", "kernel"):
    sys.modules["moecomm.gating." + name] = None  # an import of it fails now
    vars(moecomm.gating).pop(name, None)
from moecomm import route
from moecomm.gating import permute, unpermute
x = torch.ones(3, 2, requires_grad=True)
routing = route(torch.eye(3, 8, requires_grad=True), top_k=2)
unpermute(permute(x, routing), routing).sum().backward()
print("done")
"""
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert job.stdout == "done\n", job.stderr


def test_every_room_is_explained() -> None:
    for room in [*architecture_figure.CORE, *architecture_figure.WINGS]:
        assert f"| {room.name} | " in PAGE
    for contract in re.findall(r'contracts? "(.*?)"', PAGE):
        assert contract in contracts()


def test_rooms_that_use_each_other_are_found() -> None:
    with pytest.raises(ValueError, match="circle"):
        architecture_figure.levels({"a": {"b"}, "b": {"a"}, "c": set()})
    with pytest.raises(ValueError, match="is in no room"):
        architecture_figure.room_of("moecomm.nothing")


def test_nothing_of_the_map_lies_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_draw.PICTURES, "map", architecture_figure.architecture_svg)
    test_draw.test_all_is_inside_and_nothing_lies_on_another("map")
