"""The fault campaign runs, finds what is planted, and docs/reliability.md names tests and kinds that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CAMPAIGN = ROOT / "tests/campaign"
PAGE = ROOT / "docs/reliability.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def cells() -> list[tuple[str, str]]:
    """The first entry of a row and one of its other entries, for all tables of the page."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows if row[0].strip() != "fault"]
    return [(row[0], cell) for row in rows for cell in row[1:]]


def transports_of(module: Path) -> list[str]:
    """What a kind of the campaign runs over."""
    code = f"import {module.stem}; print(*{module.stem}.TRANSPORTS)"
    job = subprocess.run([sys.executable, "-c", code], cwd=CAMPAIGN, capture_output=True, text=True, check=True)
    return job.stdout.split()


def test_every_entry_of_the_table_names_what_shows_it() -> None:
    known: dict[Path, set[str]] = {}
    for fault, cell in cells():
        links = [link for link in LINK.findall(cell) if link[1].startswith("../tests/")]
        assert links, f"{fault}: no test is named in {cell!r}"
        for name, target in links:
            path = (PAGE.parent / target).resolve()
            if path not in known and path.parent == CAMPAIGN:
                known[path] = {f"{path.stem}/{transport}" for transport in transports_of(path)}
            elif path not in known:
                known[path] = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
            assert name in known[path], f"{fault}: {target} has no {name}"


def test_a_case_of_each_kind() -> None:
    kinds = ["differing", "exceptions", "kills", "stops", "checkpoints"]
    command = [sys.executable, CAMPAIGN, "--seconds", "0", "--seed", "0", "--quiet", "--transports", "threads"]
    job = subprocess.run([*command, "--kinds", *kinds], capture_output=True, text=True)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "5 cases, 0 failed" in job.stdout
    for kind in kinds:
        assert re.search(rf"^{kind} +threads +1 +0 ", job.stdout, re.MULTILINE), job.stdout


PLANTED = {
    "Checked does not compare": (
        "from moecomm.transports.wrappers import Checked\nChecked.checked = Comm.checked",
        "differing",
    ),
    "a Comm stays usable": (
        "import moecomm.failures\nmoecomm.failures.collective.__exit__ = lambda *arguments: None",
        "exceptions",
    ),
    "a meeting gives what was there before": (
        "from moecomm.transports import threads\nthreads.ThreadComm._copy = lambda *arguments: None",
        "stops",
    ),
    "checksums are not compared": (
        "import safetensors.torch, moecomm.nn.checkpoint as c\nc.load = lambda *arguments, comm: {}",
        "checkpoints",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    plant, kind = PLANTED[fault]
    code = f"""
import sys
sys.argv = ["campaign"]
from moecomm import Comm
{plant}
import {kind}
from case import Case
print(any({kind}.run(Case("{kind}", "threads", seed, 0.5))[0].problem for seed in range(30)))
"""
    job = subprocess.run([sys.executable, "-c", code], cwd=CAMPAIGN, capture_output=True, text=True)
    assert job.stdout.split()[-1:] == ["True"], job.stdout + job.stderr
