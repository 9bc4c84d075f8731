"""Examples, the objective, and the loops that learn and evaluate an intervention."""

from . import tasks
from .attributing import Attribution, attribution
from .evaluation import Evaluation, evaluate, evaluate_all
from .examples import Example, load_examples, save_examples
from .fitting import FitResult, fit
from .interchange import InterchangeResult, fit_interchange
from .objective import Objective
from .path import minimality_path
from .sources import source_activations
from .sweep_files import load_sweep
from .sweep_result import SweepFit, SweepResult
from .sweeping import sweep

__all__ = [
    "Attribution",
    "Evaluation",
    "Example",
    "FitResult",
    "InterchangeResult",
    "Objective",
    "SweepFit",
    "SweepResult",
    "attribution",
    "evaluate",
    "evaluate_all",
    "fit",
    "fit_interchange",
    "load_examples",
    "load_sweep",
    "minimality_path",
    "save_examples",
    "source_activations",
    "sweep",
    "tasks",
]
