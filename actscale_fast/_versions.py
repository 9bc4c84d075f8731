"""The versions of transformers and PyTorch that this package is tested with, and what is said of any other.

Interventions are attached to other libraries' modules. A release that renames an argument or splits a module can turn a
correct edit into a wrong one, so the installed versions are compared with the tested ones before a model is first used.
The versions come from the installed metadata: nothing is imported for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import NamedTuple

from packaging.version import InvalidVersion, Version


class Tested(NamedTuple):
    """The oldest and the newest tested release of a library."""

    oldest: str
    newest: str


#: The range that `make test-versions` covers; pyproject.toml declares its lower ends.
TESTED = {
    "transformers": Tested("5.0.0", "5.24.0"),
    "torch": Tested("2.11.0", "2.15.0"),
}

#: Releases within the range that must not be used, each with the reason, which completes "must not be used: …".
KNOWN_BAD: dict[str, dict[str, str]] = {
    "transformers": {"5.2.0": "its generate() returns wrong tokens where prefill_chunk_size splits the prompt"},
    "torch": {},
}


@functools.cache
def require_supported() -> None:
    """Check once per process that transformers and PyTorch are installed in versions that are known to work.

    Warns:
        UserWarning: a library's minor version is newer than the newest tested one.

    Raises:
        ImportError: a library is older than the oldest tested version, or is a release that is known to be bad. The
            check is then repeated by the next call.
    """
    for name, tested in TESTED.items():
        found = _installed(name)
        if found is not None:
            _check(name, found, tested)


def _check(name: str, found: str, tested: Tested) -> None:
    try:
        version = Version(found)
    except InvalidVersion:
        raise ImportError(f"{name}: got version {found!r}, expected a version number such as {tested.newest}") from None
    for bad, reason in KNOWN_BAD[name].items():
        if Version(version.base_version) == Version(bad):
            raise ImportError(f"{name}: version {found} must not be used: {reason}; {_expected(name, tested)}")
    # Vendors build PyTorch from pre-releases (2.11.0a0+…), so the numbers alone count.
    if Version(version.base_version) < Version(tested.oldest):
        raise ImportError(f"{name}: got version {found}; {_expected(name, tested)}")
    if version.release[:2] > Version(tested.newest).release[:2]:
        warnings.warn(
            f"{name}: version {found} is installed, but actscale_fast has only been tested with versions up to "
            f"{tested.newest}. If a result looks wrong, try that version: pip install '{name}=={tested.newest}'",
            stacklevel=4,
        )


def _expected(name: str, tested: Tested) -> str:
    return f"actscale_fast requires {name} {tested.oldest} or newer and is tested up to {tested.newest}"


def _installed(name: str) -> str | None:
    """The installed version of a library; None where it was not installed as a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
