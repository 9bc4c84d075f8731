"""Libraries in versions that were never tested are warned about once, and unusable ones are refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.version import Version

import actscale_fast as af
from actscale_fast import _versions
from actscale_fast._versions import TESTED, require_supported

ROOT = Path(__file__).resolve().parents[2]
MINOR_AFTER = {"transformers": "5.25.0", "torch": "2.16.0"}
Install = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _every_check_is_the_first() -> Iterator[None]:
    require_supported.cache_clear()
    yield
    require_supported.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretends that a library is installed in some version, and every other one in its newest tested version."""

    real = metadata.version

    def pretend(name: str, version: str) -> None:
        versions = {library: tested.newest for library, tested in TESTED.items()} | {name: version}
        monkeypatch.setattr(metadata, "version", lambda asked: versions[asked] if asked in versions else real(asked))

    return pretend


@pytest.fixture(params=TESTED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_supported()


def test_the_installed_versions_are_tested_ones() -> None:
    silent()


def test_the_oldest_and_the_newest_are_accepted_without_a_word(name: str, install: Install) -> None:
    for version in TESTED[name]:
        require_supported.cache_clear()
        install(name, version)
        silent()


@pytest.mark.parametrize("suffix", [".1", ".99", ".post1", "+cpu", "+cu130"])
def test_a_patch_release_or_a_build_of_the_newest_minor_version_is_accepted_without_a_word(
    name: str, suffix: str, install: Install
) -> None:
    install(name, TESTED[name].newest.removesuffix(".0" if suffix[1:].isdigit() else "") + suffix)
    silent()


def test_a_vendors_build_of_the_oldest_release_is_accepted(install: Install) -> None:
    install("torch", f"{TESTED['torch'].oldest}a0+b558c98")
    silent()


@pytest.mark.parametrize("suffix", ["", ".dev0", "rc1", "a0+git1234", "+cu140"])
def test_a_newer_minor_version_is_warned_about_with_both_versions(name: str, suffix: str, install: Install) -> None:
    version = MINOR_AFTER[name] + suffix
    install(name, version)
    with pytest.warns(UserWarning, match=re.escape(f"{name}: version {version} is installed")) as caught:
        require_supported()
    assert len(caught) == 1
    assert f"up to {TESTED[name].newest}" in str(caught[0].message)


def test_the_warning_comes_once(name: str, install: Install) -> None:
    install(name, "99.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            require_supported()
    assert len(caught) == 1


@pytest.mark.parametrize("version", ["{major}.{before}.0", "1.0", "0.0.1"])
def test_an_older_version_is_refused_with_the_range(name: str, version: str, install: Install) -> None:
    major, minor, _ = TESTED[name].oldest.split(".")
    version = version.format(major=int(major) - (minor == "0"), before=int(minor) - 1 if minor != "0" else 99)
    install(name, version)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ImportError, match=re.escape(f"{name}: got version {version}; actscale_fast requires")) as e:
            require_supported()
        assert all(end in str(e.value) for end in TESTED[name])


@pytest.mark.parametrize("found", ["5.3.0", "5.3.0+local"])
def test_a_release_that_is_known_to_be_bad_is_refused_with_the_reason(
    found: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_versions.KNOWN_BAD, "transformers", {"5.3.0": "its cache forgets every second token"})
    install("transformers", found)
    reason = f"transformers: version {found} must not be used: its cache forgets every second token"
    with pytest.raises(ImportError, match=re.escape(reason)):
        require_supported()
    install("transformers", "5.3.1")
    silent()


def test_every_release_that_is_known_to_be_bad_lies_in_the_range_and_has_a_reason() -> None:
    assert _versions.KNOWN_BAD.keys() == TESTED.keys()
    for name, bad in _versions.KNOWN_BAD.items():
        oldest, newest = map(Version, TESTED[name])
        for version, reason in bad.items():
            assert oldest <= Version(version), name
            assert Version(version).release[:2] <= newest.release[:2], name
            assert reason.strip()


def test_a_version_that_is_no_number_is_refused_by_name(name: str, install: Install) -> None:
    install(name, "main-branch")
    with pytest.raises(ImportError, match=f"{name}: got version 'main-branch', expected a version number"):
        require_supported()


def test_a_library_that_was_not_installed_as_a_package_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    silent()


def test_the_declared_requirements_begin_at_the_oldest_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, tested in TESTED.items():
        (lower,) = (s.version for s in declared[name] if s.operator == ">=")
        assert Version(lower) == Version(tested.oldest)
        assert declared[name].contains(tested.newest)


def test_importing_the_package_imports_neither_library_and_warns_of_nothing() -> None:
    program = (
        "import sys, actscale_fast, actscale_fast._versions as v; v.require_supported(); "
        "print([n for n in v.TESTED if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_first_use_of_a_model_checks_the_versions(install: Install) -> None:
    install("transformers", "4.57.6")
    with pytest.raises(ImportError, match=r"transformers: got version 4\.57\.6"):
        af.ActivScalar.for_model(tiny.llama())


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_make_test_versions_installs_both_ends_of_the_tested_range(end: str) -> None:
    (line,) = re.findall(rf"^{end.upper()} \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(pin.split("==") for pin in line.split()) == {n: getattr(t, end) for n, t in TESTED.items()}
