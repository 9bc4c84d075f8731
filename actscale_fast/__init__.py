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

from ._suggestions import unknown_attribute
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import ops as ops, plots as plots, tasks as tasks
    from .das.boundless_das import BoundlessDAS as BoundlessDAS
    from .das.fit_interchange import InterchangeResult as InterchangeResult, fit_interchange as fit_interchange
    from .demo_model import load_demo_model as load_demo_model
    from .extraction.act_add import act_add as act_add
    from .extraction.instruction import (
        InstructionVectors as InstructionVectors,
        LayerChoice as LayerChoice,
        LayerScore as LayerScore,
        instruction_vectors as instruction_vectors,
    )
    from .extraction.latent import (
        LatentResult as LatentResult,
        decode_latent as decode_latent,
        latent_vectors as latent_vectors,
        mean_vector as mean_vector,
    )
    from .extraction.mean_centring import (
        Means as Means,
        mean_activations as mean_activations,
        mean_centring as mean_centring,
    )
    from .frozen.perplexity import perplexity as perplexity
    from .frozen.stored_activations import source_activations as source_activations
    from .interventions.base import Intervention as Intervention, load_intervention as load_intervention
    from .interventions.composite import Composite as Composite, stack as stack
    from .interventions.dynamic import DynScalar as DynScalar
    from .interventions.projection import Projection as Projection
    from .interventions.scalar import ActivScalar as ActivScalar
    from .interventions.stored_heads import HeadInterchange as HeadInterchange, RunTwice as RunTwice
    from .interventions.vector import SteerVec as SteerVec
    from .learning.attribution.attribution import Attribution as Attribution, attribution as attribution
    from .learning.checkpoint import Checkpoint as Checkpoint
    from .learning.conflicts import ConflictEvaluation as ConflictEvaluation, evaluate_conflicts as evaluate_conflicts
    from .learning.evaluate import Evaluation as Evaluation, evaluate as evaluate
    from .learning.execution import Execution as Execution
    from .learning.fit import FitResult as FitResult, fit as fit
    from .learning.head_selection.circuit_metrics import (
        CircuitMetrics as CircuitMetrics,
        circuit_metrics as circuit_metrics,
        save_mib_scores as save_mib_scores,
    )
    from .learning.head_selection.compare import (
        HeadComparison as HeadComparison,
        HeadResult as HeadResult,
        compare_heads as compare_heads,
    )
    from .learning.head_selection.faithfulness import (
        HeadFaithfulness as HeadFaithfulness,
        head_faithfulness as head_faithfulness,
    )
    from .learning.head_selection.select_heads import select_heads as select_heads
    from .learning.head_selection.selection import HeadSelection as HeadSelection, ScoredHead as ScoredHead
    from .learning.objective import Objective as Objective
    from .learning.stress.result import StressResult as StressResult, StressRow as StressRow
    from .learning.stress.stress import stress as stress
    from .learning.sweep.folder import gather_sweep as gather_sweep, load_sweep as load_sweep
    from .learning.sweep.minimality_path import minimality_path as minimality_path
    from .learning.sweep.result import SweepFit as SweepFit, SweepResult as SweepResult
    from .learning.sweep.sweep import sweep as sweep
    from .ops.backends import get_backend as get_backend, set_backend as set_backend, use_backend as use_backend
    from .patching.head_mask import head_mask as head_mask
    from .patching.merge import merge as merge, unmerge as unmerge
    from .patching.patch import patch as patch
    from .patching.pretrained import (
        ActScaleConfig as ActScaleConfig,
        ActScaleModel as ActScaleModel,
        get_actscale_model as get_actscale_model,
    )
    from .reproduction.reproducing import reproduce as reproduce
    from .tasks.examples import Example as Example, save_examples as save_examples
    from .tasks.loading import load_examples as load_examples
    from .verification.verify import Verification as Verification, verify_kernels as verify_kernels

# The public names, by the module that each is imported from when it is first used: the command line answers --help
# without importing torch, which takes 3 s. The block above says the same to type checkers.
_HOMES = {
    "das": ("BoundlessDAS", "InterchangeResult", "fit_interchange"),
    "demo_model": ("load_demo_model",),
    "extraction": (
        "InstructionVectors", "LatentResult", "LayerChoice", "LayerScore", "Means", "act_add", "decode_latent",
        "instruction_vectors", "latent_vectors", "mean_activations", "mean_centring", "mean_vector",
    ),
    "frozen.perplexity": ("perplexity",),
    "frozen.stored_activations": ("source_activations",),
    "interventions": (
        "ActivScalar", "Composite", "DynScalar", "HeadInterchange", "Intervention", "Projection", "RunTwice",
        "SteerVec", "load_intervention", "stack",
    ),
    "learning": (
        "Attribution", "Checkpoint", "CircuitMetrics", "ConflictEvaluation", "Evaluation", "Execution", "FitResult",
        "HeadComparison", "HeadFaithfulness", "HeadResult", "HeadSelection", "Objective", "ScoredHead",
        "StressResult", "StressRow", "SweepFit", "SweepResult", "attribution", "circuit_metrics", "compare_heads",
        "evaluate", "evaluate_conflicts", "fit", "gather_sweep", "head_faithfulness", "load_sweep", "minimality_path",
        "save_mib_scores", "select_heads", "stress", "sweep",
    ),
    "ops": ("get_backend", "set_backend", "use_backend"),
    "patching.head_mask": ("head_mask",),
    "patching.merge": ("merge", "unmerge"),
    "patching.patch": ("patch",),
    "patching.pretrained": ("ActScaleConfig", "ActScaleModel", "get_actscale_model"),
    "reproduction": ("reproduce",),
    "tasks": ("Example", "load_examples", "save_examples"),
    "verification.verify": ("Verification", "verify_kernels"),
}  # fmt: skip
_MODULES = ("ops", "plots", "tasks")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise unknown_attribute(__name__, name, __all__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
