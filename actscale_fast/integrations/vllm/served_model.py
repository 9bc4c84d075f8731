"""What the plug-in knows of the served model and of its table, in every process: plain numbers in vLLM's configuration.

The process that takes requests writes them into `VllmConfig.additional_config`, which vLLM sends to all others and
hashes into its compilation key, so that a graph that was compiled without the table, or with another one, is not used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...architectures.location import ModelFingerprint

#: The plug-in's key in `VllmConfig.additional_config`.
KEY = "actscale"


@dataclass(frozen=True)
class ServedModel:
    """The shape of the served model, and what the table of each worker has room for.

    Attributes:
        name: the model's name or folder, as vLLM got it.
        model_types: the names that an intervention's fingerprint may have for it.
        n_layers, n_heads, head_dim, hidden_size: of the language model; all heads, of all ranks.
        kinds: the kinds of interventions that can be applied (settings.SERVED_KINDS).
        rows_per_request: how many rows of parameters one request may need.
        sources: a digest of the plug-in's and the ops' sources.
    """

    name: str
    model_types: tuple[str, ...]
    n_layers: int
    n_heads: int
    head_dim: int
    hidden_size: int
    kinds: tuple[str, ...]
    rows_per_request: int
    sources: str

    def fingerprint(self, model_type: str) -> ModelFingerprint:
        """The model's fingerprint, under one of its names."""
        known = model_type if model_type in self.model_types else self.model_types[0]
        return ModelFingerprint(known, self.n_layers, self.n_heads, self.head_dim, self.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServedModel:
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**fields)

    @classmethod
    def of_config(cls, vllm_config: Any) -> ServedModel | None:
        """What `configuration.configure` wrote into vLLM's configuration; None where the plug-in is not active."""
        additional = getattr(vllm_config, "additional_config", None)
        data = additional.get(KEY) if isinstance(additional, dict) else None
        return None if data is None else cls.from_dict(data)
