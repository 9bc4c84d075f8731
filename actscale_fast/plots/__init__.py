"""Pictures: where an intervention acts, what each head contributes, how it was learned, how systems compare.

Figures are built without pyplot, so that no global state changes and no display is needed.
"""

from typing import Any

from .._suggestions import unknown_attribute
from .curves import history
from .dots import Measured, comparison
from .fronts import pareto
from .lines import strengths
from .maps import attribution, head_scores, heatmap
from .matrices import overlap
from .paths import PathPoint, path

__all__ = [
    "Measured",
    "PathPoint",
    "attribution",
    "comparison",
    "head_scores",
    "heatmap",
    "history",
    "overlap",
    "pareto",
    "path",
    "strengths",
]


def __getattr__(name: str) -> Any:
    raise unknown_attribute(__name__, name, __all__)
