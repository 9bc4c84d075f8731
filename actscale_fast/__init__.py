"""Learn and apply activation scaling on frozen language models: one signed scalar per attention head, fast.

    >>> import actscale_fast as af
    >>> model, tokenizer = af.load_demo_model()
    >>> train, test = af.tasks.country_capital_conflicts(tokenizer)
    >>> scalars = af.ActivScalar.for_model(model)
    >>> af.fit(model, tokenizer, train, scalars)
    >>> print(af.evaluate(model, tokenizer, test, scalars))
    >>> with af.patch(model, scalars, strength=-1.0):
    ...     model.generate(...)
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from .demo_model import load_demo_model
from .interventions import ActivScalar, Intervention, SteerVec, load_intervention
from .learning import (
    Evaluation,
    Example,
    FitResult,
    Objective,
    evaluate,
    fit,
    load_examples,
    save_examples,
    tasks,
)
from .models import merge, patch, unmerge
from .ops import get_backend, set_backend, use_backend

if TYPE_CHECKING:
    from . import plots

__version__ = "0.1.0"

__all__ = [
    "ActivScalar",
    "Evaluation",
    "Example",
    "FitResult",
    "Intervention",
    "Objective",
    "SteerVec",
    "evaluate",
    "fit",
    "get_backend",
    "load_demo_model",
    "load_examples",
    "load_intervention",
    "merge",
    "ops",
    "patch",
    "plots",
    "save_examples",
    "set_backend",
    "tasks",
    "unmerge",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "plots":  # brings matplotlib, which most processes that import this package never need
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
