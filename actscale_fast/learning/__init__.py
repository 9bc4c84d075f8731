"""Examples, the objective, and the loops that learn and evaluate an intervention."""

from . import tasks
from .attributing import Attribution, attribution
from .evaluation import Evaluation, evaluate, evaluate_all
from .examples import Example, load_examples, save_examples
from .fitting import FitResult, fit
from .objective import Objective
from .path import minimality_path
from .sweep_result import SweepFit, SweepResult, load_sweep
from .sweeping import sweep

__all__ = [
    "Attribution",
    "Evaluation",
    "Example",
    "FitResult",
    "Objective",
    "SweepFit",
    "SweepResult",
    "attribution",
    "evaluate",
    "evaluate_all",
    "fit",
    "load_examples",
    "load_sweep",
    "minimality_path",
    "save_examples",
    "sweep",
    "tasks",
]
