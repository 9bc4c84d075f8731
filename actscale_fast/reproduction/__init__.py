"""One report on a model: every system on every task, the claims of the paper beside what was measured."""

from .reproducing import reproduce
from .settings import FULL, QUICK, SYSTEMS, TASKS, Size

__all__ = ["FULL", "QUICK", "SYSTEMS", "TASKS", "Size", "reproduce"]
