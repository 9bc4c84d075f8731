"""Ready-made tasks: pairs of training and held-out examples, filtered by the tokenizer at hand."""

from typing import Any

from .._suggestions import unknown_attribute
from .country_capitals import ALIGNED_CONFLICT_TEMPLATES, CONFLICT_TEMPLATES, country_capital_conflicts
from .examples import Example, save_examples
from .greater_than import GREATER_THAN_TEMPLATES, greater_than
from .indirect_objects import (
    ALIGNED_INDIRECT_OBJECT_TEMPLATES,
    INDIRECT_OBJECT_TEMPLATES,
    indirect_object_identification,
)
from .knowledge_conflicts import CONFLICT_KINDS, KNOWLEDGE_CONFLICT_TEMPLATES, knowledge_conflicts
from .known_prompts import conflict_kind
from .loading import load_examples
from .name_order import name_order
from .price_tagging import PRICE_TEMPLATE, price_tagging
from .split import TaskSplit

__all__ = [
    "ALIGNED_CONFLICT_TEMPLATES",
    "ALIGNED_INDIRECT_OBJECT_TEMPLATES",
    "CONFLICT_KINDS",
    "CONFLICT_TEMPLATES",
    "GREATER_THAN_TEMPLATES",
    "INDIRECT_OBJECT_TEMPLATES",
    "KNOWLEDGE_CONFLICT_TEMPLATES",
    "PRICE_TEMPLATE",
    "Example",
    "TaskSplit",
    "conflict_kind",
    "country_capital_conflicts",
    "greater_than",
    "indirect_object_identification",
    "knowledge_conflicts",
    "load_examples",
    "name_order",
    "price_tagging",
    "save_examples",
]


def __getattr__(name: str) -> Any:
    raise unknown_attribute(__name__, name, __all__)
