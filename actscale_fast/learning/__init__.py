"""Examples, the objective, and the loops that learn and evaluate an intervention."""

from . import tasks
from .evaluation import Evaluation, evaluate
from .examples import Example, load_examples, save_examples
from .fitting import FitResult, fit
from .objective import Objective

__all__ = [
    "Evaluation",
    "Example",
    "FitResult",
    "Objective",
    "evaluate",
    "fit",
    "load_examples",
    "save_examples",
    "tasks",
]
