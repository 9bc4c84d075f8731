"""steering-vectors: its `SteeringVector` as a `SteerVec`, and back.

`SteeringVector.apply(model, multiplier=...)` adds multiplier·vector to the output of a module of each layer; here the
multiplier is the strength of `af.patch`. In that library the steered tokens are not part of the vector:
`min_token_index` and `token_indices` count columns of each forward pass, including padding, so in `generate()` with a
KV cache min_token_index > 0 stops at the first decoded token. `positions` and `generated` here count the prompt's real
tokens and stay valid while decoding. `operator` (ablation) has no counterpart; `af.Projection` removes a direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..interventions import SteerVec
from ._library import require
from ._vectors import from_vectors, whole_vectors

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

require("steering-vectors")

#: layer_type of the library -> site.
SITES = {"decoder_block": "residual", "self_attn": "attn_out", "mlp": "mlp_out"}


def from_steering_vectors(
    vector: SteeringVector, model: Any, *, positions: Iterable[int] | None = None, generated: bool = False
) -> SteerVec:
    """A `SteeringVector` as a `SteerVec`: decoder_block at the site residual, self_attn at attn_out, mlp at mlp_out.

    Args:
        vector: its `layer_activations` hold d values for each layer, negative layers counted from the end.
        model: a causal language model of Hugging Face.
        positions, generated: as `SteerVec.for_model` takes them; each position gets the same vector.

    Raises:
        TypeError, ValueError: the output of a norm, which is not a site here; another width; an unknown layer.

    Example:
        >>> with af.patch(model, from_steering_vectors(vector, model), strength=-1.0):
        ...     model.generate(**inputs)
    """
    if vector.layer_type not in SITES:
        raise ValueError(
            f"vector: its layer_type is {vector.layer_type!r}, the output of a norm, which is not a site here; expected"
            f" one of {', '.join(SITES)}"
        )
    flat = {layer: value.detach().reshape(-1) for layer, value in vector.layer_activations.items()}
    return from_vectors(flat, model, SITES[vector.layer_type], positions=positions, generated=generated)


def to_steering_vectors(steer_vec: SteerVec) -> SteeringVector:
    """A `SteerVec` as a `SteeringVector`, float32 on the CPU; its `.to(...)` moves it.

    Args:
        steer_vec: at a whole site, for every token, unstacked.

    Raises:
        TypeError, ValueError: what a `SteeringVector` cannot express: heads, positions, a stack, or a module
            that a path names.
    """
    from steering_vectors import SteeringVector

    vectors = whole_vectors(steer_vec, SITES.values(), "steering-vectors")
    kind: Any = next(kind for kind, site in SITES.items() if site == steer_vec.location.site)
    return SteeringVector(layer_activations=vectors, layer_type=kind)
