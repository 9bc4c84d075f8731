"""The objective, and the loops that learn, evaluate and compare interventions on a frozen model."""

from .attribution.attribution import Attribution, attribution
from .checkpoint import Checkpoint
from .evaluate import Evaluation, evaluate, evaluate_all
from .execution import Execution
from .fit import FitResult, fit
from .objective import Objective
from .sweep.folder import gather_sweep, load_sweep
from .sweep.minimality_path import minimality_path
from .sweep.result import SweepFit, SweepResult
from .sweep.sweep import sweep

__all__ = [
    "Attribution",
    "Checkpoint",
    "Evaluation",
    "Execution",
    "FitResult",
    "Objective",
    "SweepFit",
    "SweepResult",
    "attribution",
    "evaluate",
    "evaluate_all",
    "fit",
    "gather_sweep",
    "load_sweep",
    "minimality_path",
    "sweep",
]
