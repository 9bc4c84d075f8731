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

if TYPE_CHECKING:
    from . import ops, plots
    from .demo_model import load_demo_model
    from .interventions import (
        ActivScalar,
        Composite,
        DynScalar,
        Intervention,
        Projection,
        SteerVec,
        load_intervention,
        stack,
    )
    from .learning import (
        Attribution,
        Evaluation,
        Example,
        FitResult,
        Objective,
        SweepFit,
        SweepResult,
        attribution,
        evaluate,
        fit,
        load_examples,
        load_sweep,
        minimality_path,
        save_examples,
        sweep,
        tasks,
    )
    from .models import merge, patch, unmerge
    from .ops import get_backend, set_backend, use_backend

__version__ = "0.1.0"

# A name is imported when it is first used: the command line answers --help without torch (3 s).
_HOMES = {
    "ops": ("get_backend", "set_backend", "use_backend"),
    "demo_model": ("load_demo_model",),
    "interventions": (
        "ActivScalar", "Composite", "DynScalar", "Intervention", "Projection", "SteerVec", "load_intervention", "stack",
    ),
    "learning": (
        "Attribution", "Evaluation", "Example", "FitResult", "Objective", "SweepFit", "SweepResult", "attribution",
        "evaluate", "fit", "load_examples", "load_sweep", "minimality_path", "save_examples",
        "sweep", "tasks",
    ),
    "models": ("merge", "patch", "unmerge"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ActivScalar",
    "Attribution",
    "Composite",
    "DynScalar",
    "Evaluation",
    "Example",
    "FitResult",
    "Intervention",
    "Objective",
    "Projection",
    "SteerVec",
    "SweepFit",
    "SweepResult",
    "attribution",
    "evaluate",
    "fit",
    "get_backend",
    "load_demo_model",
    "load_examples",
    "load_intervention",
    "load_sweep",
    "merge",
    "minimality_path",
    "ops",
    "patch",
    "plots",
    "save_examples",
    "set_backend",
    "stack",
    "sweep",
    "tasks",
    "unmerge",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    elif name in ("ops", "plots"):
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
