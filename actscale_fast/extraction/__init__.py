"""Steering vectors without training examples: from pairs of prompts, from texts, or for a given sentence."""

from .act_add import act_add
from .continuations import continuations
from .instruction import InstructionVectors, LayerChoice, LayerScore, instruction_vectors
from .latent import LatentResult, decode_latent, latent_vectors, mean_vector
from .mean_centring import Means, mean_activations, mean_centring

__all__ = [
    "InstructionVectors",
    "LatentResult",
    "LayerChoice",
    "LayerScore",
    "Means",
    "act_add",
    "continuations",
    "decode_latent",
    "instruction_vectors",
    "latent_vectors",
    "mean_activations",
    "mean_centring",
    "mean_vector",
]
