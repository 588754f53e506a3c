"""bench/plot.py draws the records of every benchmark, and says in one line what is wrong with a file."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT

RESULTS = ROOT / "bench" / "results"
FILES = {
    "alltoall_64_one_host": (),
    "cluster_4x16_mpich_zipf": (),
    "exchange_64_one_host": (),
    "exchange_gpu_h200": ("k=8", "sms=132"),
    "gating_cpu": ("stage=route", "threads=1"),
    "gating_h200": ("stage=whole", "E=128"),
    "prediction_4x16_cluster_mpich": (),
}


@pytest.fixture(scope="module", autouse=True)
def plot() -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "bench"))


@pytest.mark.parametrize("name", FILES)
def test_draws_each_kind(name: str) -> None:
    import plot

    panels = plot.read([RESULTS / f"{name}.jsonl"], FILES[name])
    figure = plot.draw(panels)
    records = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    assert {bench for bench, _ in panels} == {records[0]["bench"]}
    figure.draw_without_rendering()
    assert len(figure.axes) == len(panels)
    for axes in figure.axes:
        renderer = figure.canvas.get_renderer()
        for axis in (axes.xaxis, axes.yaxis):
            shown = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent(renderer) for label in shown]
            for box, other in combinations(boxes, 2):
                assert not box.overlaps(other)
    plot.plt.close(figure)


def test_the_same_records_give_the_same_picture(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        job = run(str(RESULTS / "exchange_64_one_host.jsonl"), "--out", str(tmp_path / name))
        assert job.returncode == 0, job.stderr
        texts.append((tmp_path / f"{name}.svg").read_bytes())
    assert texts[0] == texts[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "plot.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty, expected the records of a benchmark"),
        ("rank 0\n", ":1: not JSON ("),
        ("[1]\n", ":1: bench is None, expected one of alltoall, cluster, "),
        ('{"bench": "poem"}\n', ":1: bench is 'poem', expected one of alltoall, cluster, "),
        ('{"bench": "alltoall", "algorithm": "flat"}\n', ":1: a record of alltoall without 'p'"),
        (None, ": No such file or directory, expected JSON Lines"),
    ],
)
def test_files_that_cannot_be_drawn(tmp_path: Path, text: str | None, wanted: str) -> None:
    import plot

    file = tmp_path / "records.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(plot.Unusable) as caught:
        plot.read([file])
    assert str(caught.value).startswith(str(file))
    assert wanted in str(caught.value)


def test_an_error_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    job = run(str(tmp_path / "none.jsonl"))
    assert job.returncode == 2
    assert job.stderr.splitlines()[-1].startswith("plot.py: error: ")
    assert "Traceback" not in job.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["none.jsonl"]


def test_too_many_panels_and_no_record() -> None:
    import plot

    with pytest.raises(plot.Unusable, match=r"panels, expected at most 24: choose by --where KEY=VALUE \(bench, impl"):
        plot.read([RESULTS / "gating_h200.jsonl"])
    with pytest.raises(plot.Unusable, match="no record has stage=none"):
        plot.read([RESULTS / "gating_h200.jsonl"], ["stage=none"])
