"""The versions of other libraries that the integrations are tested with; any other version is refused."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

#: The versions of each distribution that are tested.
SUPPORTED = {
    "lm-eval": ">=0.4.13,<0.5",
    "nnsight": ">=0.8.1,<0.9",
    "peft": ">=0.21.2,<0.22",
    "pyvene": ">=0.1.8,<0.2",
    "repeng": ">=0.4,<0.5",
    "steering-vectors": ">=0.12.2,<0.13",
    "transformer-lens": ">=4.3,<5",
}
#: Libraries whose requirements exclude transformers 5 or NumPy 2, although they work with them.
_UNPINNED = ("repeng", "steering-vectors")


def require(name: str) -> None:
    """Check that a distribution is installed in a supported version.

    Raises:
        ImportError: it is not installed, or in another version, whose internals may differ so that an edit that lands
            elsewhere gives silently wrong results.
    """
    wanted = name + SUPPORTED[name]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        how = f"--no-deps '{wanted}'" if name in _UNPINNED else f"'actscale-fast[{name}]'"
        raise ImportError(
            f"actscale_fast.integrations: {name} is not installed; expected {wanted} (pip install {how})"
        ) from None
    if not SpecifierSet(SUPPORTED[name]).contains(version, prereleases=True):
        raise ImportError(f"actscale_fast.integrations: got {name} {version}, expected {wanted}")
