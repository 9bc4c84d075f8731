"""Whether prompts may be packed into rows: the model must take such a mask, and give the same results with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...architectures.arguments import accepted_arguments
from ...architectures.families import FAMILIES
from ...architectures.layout import ModelLayout
from ...interventions import Intervention
from .packing import COLUMNS, additive
from .reference_cache import ReferenceCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def may_pack(model: PreTrainedModel, found: ModelLayout, intervention: Intervention, longest: int) -> bool:
    """Whether prompts of at most `longest` tokens may share rows, as far as can be known without running the model."""
    return (
        model is found.model  # a compiled model would be compiled for every width
        and found.model_type in FAMILIES  # others may not take such a mask
        and "position_ids" in accepted_arguments(model)
        and all(single.location.positions is None for single in intervention.singles)
        and attention_may_pack(model.config.get_text_config(), longest)
    )


def attention_may_pack(config: Any, longest: int) -> bool:
    """Whether attention takes a mask, and no window of it is narrower than a row may be.

    In a row of several prompts, a window that is counted in columns could cut a prompt off from its own beginning.
    """
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")]
    widest = longest + max(COLUMNS)
    narrow = any(isinstance(window, int) and window < widest for window in windows)
    if getattr(config, "alibi", False):  # its biases are made from a mask of tokens
        return False
    return config._attn_implementation in ("sdpa", "eager") and not narrow


def packing_matches(cache: ReferenceCache, packed: dict[str, Tensor], columns: Sequence[int], alone: Tensor) -> bool:
    """Whether a packed row gives its prompts the same hidden states as they have alone, because of its mask.

    Args:
        cache: runs the frozen model.
        packed: "ids", "positions" and "mask" of the row.
        columns: the columns of the prompts' last tokens.
        alone: the head's inputs of the prompts [prompts, d], each run alone.
    """
    arguments = {"input_ids": packed["ids"], "position_ids": packed["positions"], "use_cache": False}
    causal = additive(torch.ones_like(packed["mask"], dtype=torch.bool).tril(), cache.dtype)
    errors = []
    for mask in (packed["mask"], causal):
        found, _ = cache.run_frozen(arguments | {"attention_mask": mask}, every_token=True)
        errors.append((found[0, list(columns)] - alone).norm(dim=-1))
    masked, unmasked = errors
    # Half of the digits: a wrong position is far beyond that, and rounding far below (some models compute attention in
    # float32 whatever their dtype). In 16 bits this says little, so the mask has to make a difference as well.
    digits = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    close = (masked <= digits**0.5 * alone.norm(dim=-1)).all()
    return bool(close and masked.max() <= 0.1 * unmasked.max())
