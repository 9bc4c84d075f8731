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
    from .extraction import (
        InstructionVectors,
        LatentResult,
        LayerChoice,
        LayerScore,
        Means,
        act_add,
        decode_latent,
        instruction_vectors,
        latent_vectors,
        mean_activations,
        mean_centring,
        mean_vector,
    )
    from .interventions import (
        ActivScalar,
        BoundlessDAS,
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
        InterchangeResult,
        Objective,
        SweepFit,
        SweepResult,
        attribution,
        evaluate,
        fit,
        fit_interchange,
        load_examples,
        load_sweep,
        minimality_path,
        save_examples,
        source_activations,
        sweep,
        tasks,
    )
    from .models import (
        ActScaleConfig,
        ActScaleModel,
        get_actscale_model,
        head_mask,
        merge,
        patch,
        perplexity,
        unmerge,
    )
    from .ops import get_backend, set_backend, use_backend
    from .reproduction import reproduce

__version__ = "0.1.0"

# A name is imported when it is first used: the command line answers --help without torch (3 s).
_HOMES = {
    "demo_model": ("load_demo_model",),
    "extraction": (
        "InstructionVectors", "LatentResult", "LayerChoice", "LayerScore", "Means", "act_add", "decode_latent",
        "instruction_vectors", "latent_vectors", "mean_activations", "mean_centring", "mean_vector",
    ),
    "interventions": (
        "ActivScalar", "BoundlessDAS", "Composite", "DynScalar", "Intervention", "Projection", "SteerVec",
        "load_intervention", "stack",
    ),
    "learning": (
        "Attribution", "Evaluation", "Example", "FitResult", "InterchangeResult", "Objective", "SweepFit",
        "SweepResult", "attribution", "evaluate", "fit", "fit_interchange", "load_examples", "load_sweep",
        "minimality_path", "save_examples", "source_activations", "sweep", "tasks",
    ),
    "models": (
        "ActScaleConfig", "ActScaleModel", "get_actscale_model", "head_mask", "merge", "patch", "perplexity",
        "unmerge",
    ),
    "ops": ("get_backend", "set_backend", "use_backend"),
    "reproduction": ("reproduce",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ActScaleConfig",
    "ActScaleModel",
    "ActivScalar",
    "Attribution",
    "BoundlessDAS",
    "Composite",
    "DynScalar",
    "Evaluation",
    "Example",
    "FitResult",
    "InstructionVectors",
    "InterchangeResult",
    "Intervention",
    "LatentResult",
    "LayerChoice",
    "LayerScore",
    "Means",
    "Objective",
    "Projection",
    "SteerVec",
    "SweepFit",
    "SweepResult",
    "act_add",
    "attribution",
    "decode_latent",
    "evaluate",
    "fit",
    "fit_interchange",
    "get_actscale_model",
    "get_backend",
    "head_mask",
    "instruction_vectors",
    "latent_vectors",
    "load_demo_model",
    "load_examples",
    "load_intervention",
    "load_sweep",
    "mean_activations",
    "mean_centring",
    "mean_vector",
    "merge",
    "minimality_path",
    "ops",
    "patch",
    "perplexity",
    "plots",
    "reproduce",
    "save_examples",
    "set_backend",
    "source_activations",
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
