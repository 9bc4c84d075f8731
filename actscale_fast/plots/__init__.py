"""Pictures: where an intervention acts, what each head contributes, and how an intervention was learned.

Figures are built without pyplot, so that no global state changes and no display is needed.
"""

from .curves import history
from .fronts import pareto
from .maps import attribution, heatmap

__all__ = ["attribution", "heatmap", "history", "pareto"]
