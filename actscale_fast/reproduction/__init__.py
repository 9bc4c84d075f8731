"""One report on a model: every system on every task, and the paper's claims beside the measurements."""

from .reproducing import reproduce
from .systems import FULL, QUICK, SYSTEMS, TASKS, Size

__all__ = ["FULL", "QUICK", "SYSTEMS", "TASKS", "Size", "reproduce"]
