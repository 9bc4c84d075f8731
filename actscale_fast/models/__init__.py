"""Where interventions act: the sites of Hugging Face models, patching and merging."""

from .actscale_model import ActScaleConfig, ActScaleModel, get_actscale_model
from .adapter import ModelLayout, layout
from .applying import AnyPatch, Patches, patch
from .calling import (
    Batch,
    accepted_arguments,
    forward_arguments,
    left_padded,
    next_token_logits,
    open_ids,
    pad_id_of,
)
from .families import FAMILIES, Family
from .head import OutputHead, read_head
from .head_mask import HeadMask, head_mask
from .merge import merge, unmerge
from .modes import frozen
from .opening import opened
from .patch import Patch
from .perplexity import perplexity
from .products import fast_products
from .reading import Reader
from .section import KeysValues, Prefix, Section, keys_and_values

__all__ = [
    "FAMILIES",
    "ActScaleConfig",
    "ActScaleModel",
    "AnyPatch",
    "Batch",
    "Family",
    "HeadMask",
    "KeysValues",
    "ModelLayout",
    "OutputHead",
    "Patch",
    "Patches",
    "Prefix",
    "Reader",
    "Section",
    "accepted_arguments",
    "fast_products",
    "forward_arguments",
    "frozen",
    "get_actscale_model",
    "head_mask",
    "keys_and_values",
    "layout",
    "left_padded",
    "merge",
    "next_token_logits",
    "open_ids",
    "opened",
    "pad_id_of",
    "patch",
    "perplexity",
    "read_head",
    "unmerge",
]
