"""One step of one fit or of many: the three terms and their gradients, at the cost of what an intervention can change.

A step has shares, one a fit: prompts, an objective, a group of scalars (`arrangement`). Each prompt runs under each
direction. What the interventions cannot reach is constant and kept (`constants`, `frozen_side`); the rest is put into
passes of little padding (`planning`, `packing`), written down as tensors (`inputs`) and computed as a section of the
model (`passes`), on a GPU also as CUDA graphs (`capture`). The last hidden states go to the fused losses, never as
logits where the head allows it.
"""

from .batch_plan import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, even_size, plan
from .engine import Engine
from .extent import CACHE_BYTES, SPILL_BYTES, Extent, extent_of
from .gradient_check import GradientError, gradient_on_trial
from .microbatches import Item, Share, Unit, may_pack

__all__ = [
    "CACHE_BYTES",
    "PASS_COST_CPU",
    "PASS_COST_GPU",
    "PASS_TOKENS_CPU",
    "SPILL_BYTES",
    "Engine",
    "Extent",
    "GradientError",
    "Item",
    "Share",
    "Unit",
    "even_size",
    "extent_of",
    "gradient_on_trial",
    "may_pack",
    "plan",
]
