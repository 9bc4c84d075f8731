"""Where interventions act: the sites of Hugging Face models, patching and merging."""

from .adapter import ModelLayout, layout
from .families import FAMILIES, Family
from .head import OutputHead, read_head
from .merge import merge, unmerge
from .opening import opened
from .patch import Patch, patch
from .products import fast_products
from .section import KeysValues, Prefix, Section, keys_and_values

__all__ = [
    "FAMILIES",
    "Family",
    "KeysValues",
    "ModelLayout",
    "OutputHead",
    "Patch",
    "Prefix",
    "Section",
    "fast_products",
    "keys_and_values",
    "layout",
    "merge",
    "opened",
    "patch",
    "read_head",
    "unmerge",
]
