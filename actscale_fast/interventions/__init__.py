"""What is done to an activation: small modules whose parameters are learned."""

from .base import Intervention, load_intervention
from .location import SITES, Location, ModelFingerprint
from .positions import Placement, Prompt, slot_index
from .scalar import ActivScalar
from .vector import SteerVec

__all__ = [
    "SITES",
    "ActivScalar",
    "Intervention",
    "Location",
    "ModelFingerprint",
    "Placement",
    "Prompt",
    "SteerVec",
    "load_intervention",
    "slot_index",
]
