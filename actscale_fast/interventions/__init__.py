"""What is done to an activation: small modules whose parameters are learned or taken from other activations."""

from .base import Intervention, load_intervention
from .composite import Composite, stack
from .dynamic import DynScalar, Produced, produced_l1
from .placement import Placement
from .projection import Projection
from .scalar import ActivScalar
from .vector import SteerVec

__all__ = [
    "ActivScalar",
    "Composite",
    "DynScalar",
    "Intervention",
    "Placement",
    "Produced",
    "Projection",
    "SteerVec",
    "load_intervention",
    "produced_l1",
    "stack",
]
