"""What of the dispatcher for torchtitan needs no torchtitan. `make torchtitan` trains with it."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest

pytest.importorskip("torch")
NAME = "moecomm.integrations.torchtitan"


@pytest.mark.parametrize("version", ["0.2.9", "0.4.0", "1.3.0", "0.30.0"])
def test_a_version_that_is_not_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=f"torchtitan is {version}, expected 0.3, with which .* torchtitan==0.3.0"):
        importlib.import_module(NAME)


def test_torchtitan_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"{NAME}: needs torchtitan: pip install"):
        importlib.import_module(NAME)
