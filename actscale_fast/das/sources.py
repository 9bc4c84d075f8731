"""The activations that an interchange takes from other prompts, its sources."""

from __future__ import annotations

from ..frozen.stored_activations import activations_at, source_activations

__all__ = ["activations_at", "source_activations"]
