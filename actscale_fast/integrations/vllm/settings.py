"""The plug-in's settings, which are environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..._suggestions import did_you_mean

FOLDER = "ACTSCALE_INTERVENTIONS"
KINDS = "ACTSCALE_KINDS"
ROWS = "ACTSCALE_ROWS_PER_REQUEST"

#: Steering vectors at the output of the attention's projection.
VECTORS_AT_OUTPUT = "SteerVec:attn_out"
#: What the plug-in can apply: classes at heads, in the order of the operations on an activation, and at another site.
SERVED_KINDS = ("ActivScalar", "SteerVec", "DynScalar", VECTORS_AT_OUTPUT)
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
        folder: the folder of saved interventions, or one saved intervention.
        kinds: those of SERVED_KINDS that the table has room for; None: those found in the folder at the start.
        rows_per_request: how many different rows of parameters one request may need; None: chosen at the start.
    """

    folder: Path
    kinds: tuple[str, ...] | None = None
    rows_per_request: int | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings | None:
        """The settings, or None where no folder is configured.

        Raises:
            ValueError: a variable has a value that it cannot have.
        """
        values = os.environ if environment is None else environment
        folder = values.get(FOLDER, "").strip()
        if not folder:
            return None
        return cls(Path(folder).expanduser(), _kinds(values.get(KINDS, "")), _rows(values.get(ROWS, "")))


def _kinds(text: str) -> tuple[str, ...] | None:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SERVED_KINDS:
            raise ValueError(
                f"{KINDS}: got {name!r}, expected some of {', '.join(SERVED_KINDS)}{did_you_mean(name, SERVED_KINDS)}"
            )
    return tuple(kind for kind in SERVED_KINDS if kind in names) or None


def _rows(text: str) -> int | None:
    if not text.strip():
        return None
    if not text.strip().isdecimal() or not 1 <= int(text) <= _MOST_ROWS:
        raise ValueError(f"{ROWS}: got {text!r}, expected a number from 1 to {_MOST_ROWS}")
    return int(text)
