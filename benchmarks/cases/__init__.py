"""The cases by name; each module has a function `case()`."""

from __future__ import annotations

import importlib

from ..case import Case

NAMES = ("loss", "linear", "kl_div", "scale_heads", "dynamic_scale", "proximal", "overhead", "fit", "sweep")
DEFAULT = NAMES[:-2]  # the last two load a real model and take minutes: asked for by name


def load(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: no such case.
    """
    if name not in NAMES:
        raise KeyError(f"case: got {name!r}, expected one of {', '.join(NAMES)}")
    case: Case = importlib.import_module(f".{name}", __name__).case()
    return case
