"""What is done to an activation: small modules whose parameters are learned or taken from other activations."""

from .base import Intervention, load_intervention
from .composite import Composite, stack
from .dynamic import DynScalar, Produced, produced_l1
from .placement import Placement
from .projection import Projection
from .scalar import ActivScalar
from .stored_heads import HeadInterchange, RunTwice
from .takes_source import TakesSource
from .vector import SteerVec

__all__ = [
    "ActivScalar",
    "Composite",
    "DynScalar",
    "HeadInterchange",
    "Intervention",
    "Placement",
    "Produced",
    "Projection",
    "RunTwice",
    "SteerVec",
    "TakesSource",
    "load_intervention",
    "produced_l1",
    "stack",
]
