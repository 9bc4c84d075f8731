"""Ready-made tasks: pairs of training and held-out examples, filtered by the tokenizer at hand."""

from .country_capitals import CONFLICT_TEMPLATES, country_capital_conflicts
from .indirect_objects import INDIRECT_OBJECT_TEMPLATES, indirect_object_identification
from .split import TaskSplit

__all__ = [
    "CONFLICT_TEMPLATES",
    "INDIRECT_OBJECT_TEMPLATES",
    "TaskSplit",
    "country_capital_conflicts",
    "indirect_object_identification",
]
