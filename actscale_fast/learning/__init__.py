"""The objective, and the loops that learn, evaluate and compare interventions on a frozen model."""

from .attribution.attribution import Attribution, attribution
from .checkpoint import Checkpoint
from .conflicts import ConflictEvaluation, evaluate_conflicts
from .evaluate import Evaluation, evaluate, evaluate_all
from .execution import Execution
from .fit import FitResult, fit
from .head_selection.circuit_metrics import CircuitMetrics, circuit_metrics, save_mib_scores
from .head_selection.compare import HeadComparison, HeadResult, compare_heads
from .head_selection.faithfulness import HeadFaithfulness, head_faithfulness
from .head_selection.select_heads import select_heads
from .head_selection.selection import HeadSelection, ScoredHead
from .objective import Objective
from .stress.result import StressResult, StressRow
from .stress.stress import stress
from .sweep.folder import gather_sweep, load_sweep
from .sweep.minimality_path import minimality_path
from .sweep.result import SweepFit, SweepResult
from .sweep.sweep import sweep

__all__ = [
    "Attribution",
    "Checkpoint",
    "CircuitMetrics",
    "ConflictEvaluation",
    "Evaluation",
    "Execution",
    "FitResult",
    "HeadComparison",
    "HeadFaithfulness",
    "HeadResult",
    "HeadSelection",
    "Objective",
    "ScoredHead",
    "StressResult",
    "StressRow",
    "SweepFit",
    "SweepResult",
    "attribution",
    "circuit_metrics",
    "compare_heads",
    "evaluate",
    "evaluate_all",
    "evaluate_conflicts",
    "fit",
    "gather_sweep",
    "head_faithfulness",
    "load_sweep",
    "minimality_path",
    "save_mib_scores",
    "select_heads",
    "stress",
    "sweep",
]
