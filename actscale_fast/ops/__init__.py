"""Tensors in, tensors out: the fused ops. They know no model."""

from .backends import get_backend, set_backend, use_backend
from .channels import scale_channels
from .dynamic import dynamic_scale
from .kl_div import kl_div_from_logits
from .linear_kl import linear_kl_div
from .linear_loss import linear_intervention_loss
from .linear_statistics import ReferenceStatistics, reference_statistics
from .loss import intervention_loss
from .optimizer import proximal_adam_
from .scaling import scale_heads

__all__ = [
    "ReferenceStatistics",
    "dynamic_scale",
    "get_backend",
    "intervention_loss",
    "kl_div_from_logits",
    "linear_intervention_loss",
    "linear_kl_div",
    "proximal_adam_",
    "reference_statistics",
    "scale_channels",
    "scale_heads",
    "set_backend",
    "use_backend",
]
