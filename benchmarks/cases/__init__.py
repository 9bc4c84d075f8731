"""The cases by name; each module has a function `case()`."""

from __future__ import annotations

import importlib

from ..case import Case

#: The ops.
DEFAULT = ("loss", "linear", "kl_div", "linear_kl", "scale_heads", "dynamic_scale", "proximal", "overhead")
#: Other libraries' own paths beside ours, where they are installed; asked for by name.
INTEGRATIONS = ("head_mask", "serving", "vectors", "gates", "transformer_lens", "pyvene", "nnsight", "peft")
#: Steps on a real model, which take minutes; asked for by name.
STEPS = ("fit", "sweep")
NAMES = DEFAULT + INTEGRATIONS + STEPS


def load(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: no such case.
    """
    if name not in NAMES:
        raise KeyError(f"case: got {name!r}, expected one of {', '.join(NAMES)}")
    case: Case = importlib.import_module(f".{name}", __name__).case()
    return case
