"""Where interventions act: the sites of Hugging Face models, patching and merging."""

from .adapter import ModelLayout, layout
from .families import FAMILIES, Family
from .merge import merge, unmerge
from .patch import Patch, patch

__all__ = ["FAMILIES", "Family", "ModelLayout", "Patch", "layout", "merge", "patch", "unmerge"]
