"""The ops as CUDA kernels of the extension (csrc/cuda): an `interface.BackendModule`.

Run on an emulated device and compiled for sm_80, sm_90 and sm_100; not run on a GPU yet. Two ops have no kernel
of their own here: `linear_softmax` is PyTorch's matrix products, and plain PyTorch between them; `scale_channels`
reads and writes each element once, as Triton's kernel does.
"""

from __future__ import annotations

from ..losses.linear_softmax import in_chunks as linear_softmax
from ..triton.scale_channels import scale_channels, scale_channels_backward
from .dynamic_scale import dynamic_scale, dynamic_scale_backward
from .intervention_loss import intervention_loss, intervention_loss_scale_
from .proximal_adam import proximal_adam_
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
