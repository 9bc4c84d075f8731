"""Tensors in, tensors out: the fused ops. They know no model."""

from .backends import get_backend, set_backend, use_backend
from .dynamic_scale import dynamic_scale
from .losses.intervention_loss import intervention_loss
from .losses.kl_div import kl_div_from_logits
from .losses.linear_intervention_loss import linear_intervention_loss
from .losses.linear_kl_div import linear_kl_div
from .losses.reference_statistics import ReferenceStatistics, reference_statistics
from .proximal_adam import proximal_adam_
from .scale_channels import scale_channels
from .scale_heads import scale_heads

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
