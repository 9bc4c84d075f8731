"""The ops as Triton kernels, for every GPU that Triton serves: a `interface.BackendModule`."""

from __future__ import annotations

from .dynamic_scale import dynamic_scale, dynamic_scale_backward
from .intervention_loss import intervention_loss
from .intervention_loss_scale import intervention_loss_scale_
from .linear_softmax import linear_softmax
from .proximal_adam import proximal_adam_
from .scale_channels import scale_channels, scale_channels_backward
from .scale_heads import scale_heads, scale_heads_backward

__all__ = [
    "dynamic_scale",
    "dynamic_scale_backward",
    "intervention_loss",
    "intervention_loss_scale_",
    "linear_softmax",
    "proximal_adam_",
    "scale_channels",
    "scale_channels_backward",
    "scale_heads",
    "scale_heads_backward",
]
