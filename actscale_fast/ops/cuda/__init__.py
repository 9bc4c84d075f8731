"""The ops as CUDA kernels of the extension (csrc/cuda): an `interface.BackendModule`.

Run on an emulated device and compiled for sm_80, sm_90 and sm_100; not run on a GPU yet. One op has no kernel of its
own here: `linear_softmax` is PyTorch's matrix products, and plain PyTorch between them. Triton is not needed.
"""

from __future__ import annotations

from ..losses.linear_softmax import in_chunks as linear_softmax
from .dynamic_scale import dynamic_scale, dynamic_scale_backward
from .intervention_loss import intervention_loss, intervention_loss_scale_
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
