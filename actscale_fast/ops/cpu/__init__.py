"""The C++ kernels as an `interface.BackendModule`; outputs are allocated here.

Each call runs on `torch.get_num_threads()` of PyTorch's own OpenMP threads (torch is loaded first, so the extension's
calls resolve to its runtime); results do not depend on how many. The processor decides on the instructions: AVX-512,
AVX2 or portable, and for `linear_softmax` AMX or AVX512_BF16 where the processor's verdict has found that faster.
The environment variable ACTSCALE_CPU_LEVEL forces a level.
"""

from __future__ import annotations

import os

import torch as torch  # its OpenMP runtime, before the extension's

from .. import _C  # type: ignore[attr-defined]
from .dynamic_scale import dynamic_scale, dynamic_scale_backward
from .intervention_loss import intervention_loss, intervention_loss_scale_
from .linear_softmax import linear_softmax
from .proximal_adam import proximal_adam_
from .scale_channels import scale_channels, scale_channels_backward
from .scale_heads import scale_heads, scale_heads_backward

if "ACTSCALE_CPU_LEVEL" in os.environ:
    _C.set_level(os.environ["ACTSCALE_CPU_LEVEL"])

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
