"""One report on a model, or on several: every system on every task, and the paper's claims beside the measurements."""

from .reproducing import reproduce
from .several import PAPER_MODELS, reproduce_models
from .size import FULL, QUICK, Size
from .systems import SYSTEMS
from .task_forms import TASKS

__all__ = ["FULL", "PAPER_MODELS", "QUICK", "SYSTEMS", "TASKS", "Size", "reproduce", "reproduce_models"]
