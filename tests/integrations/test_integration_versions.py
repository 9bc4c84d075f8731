"""Integrations say which versions they are tested with, and refuse others before they do anything."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from actscale_fast.integrations._library import SUPPORTED, require

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
UNPINNED = [line for line in (ROOT / "tests" / "unpinned.txt").read_text().splitlines() if not line.startswith("#")]


def test_every_supported_library_is_tested_in_one_version_and_offered_as_an_extra_where_pip_can_resolve_it() -> None:
    pinned = {r.name: r.specifier for r in map(Requirement, [*EXTRAS["test"], *UNPINNED])}
    for name, supported in SUPPORTED.items():
        (pin,) = pinned[name]
        assert pin.operator == "=="
        assert SpecifierSet(supported).contains(pin.version), name
        assert name in EXTRAS or any(line.startswith(f"{name}==") for line in UNPINNED)
        if name in EXTRAS:
            assert Requirement(EXTRAS[name][0]).specifier == SpecifierSet(supported)


@pytest.mark.parametrize("name", SUPPORTED)
def test_another_version_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    with pytest.raises(ImportError, match=rf"got {name} 0\.0\.1, expected {name}>="):
        require(name)


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"peft is not installed; .* \(pip install 'actscale-fast\[peft\]'\)"):
        require("peft")
    with pytest.raises(ImportError, match=r"repeng is not installed; .* \(pip install --no-deps 'repeng"):
        require("repeng")


@pytest.mark.parametrize("module", ["lm_eval", "nnsight", "peft", "pyvene", "transformer_lens"])
def test_an_integration_refuses_another_version_when_it_is_imported(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"actscale_fast.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    with pytest.raises(ImportError, match=r"got .* 0\.0\.1, expected"):
        importlib.import_module(name)
    monkeypatch.undo()
    importlib.import_module(name)
