"""Which model an intervention was made for, so that another fine-tune with the same shape can be told from it."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from .._json import shown
from .hugging_face import unwrap
from .weights_digest import weights_digest

#: A longer name is neither saved nor read.
_LONGEST = 4096
#: The origins that a model was compared with already, or was found to have itself.
_compared: weakref.WeakKeyDictionary[nn.Module, set[ModelOrigin]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ModelOrigin:
    """A model by its name and its weights; None is not known."""

    name: str | None = None  # on the Hugging Face hub, or the folder that it was loaded from
    architecture: str | None = None  # the class, such as "LlamaForCausalLM"
    dtype: str | None = None
    weights: str | None = None  # `weights_digest`

    def to_dict(self) -> dict[str, str | None]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelOrigin:
        """The inverse of `to_dict`, for untrusted data; raises a ValueError if a field is unknown or bad."""
        known = {item.name for item in fields(cls)}
        if not isinstance(data, dict) or not data.keys() <= known:
            raise ValueError(f"model: got {shown(data)}, expected an object with {', '.join(sorted(known))}")
        for name, value in data.items():
            if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST):
                raise ValueError(f"model: got the {name} {shown(value)}, expected a text or null")
        return cls(**data)

    def __str__(self) -> str:
        known = [self.name or self.architecture, None if self.weights is None else f"digest {self.weights}"]
        return ", ".join(filter(None, known)) or "unknown"


def origin_of(model: nn.Module) -> ModelOrigin:
    """The origin of a model. Its weights are not known where reading them fails or would fetch them from elsewhere."""
    model = unwrap(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    found = ModelOrigin(
        name if isinstance(name, str) and 0 < len(name) <= _LONGEST else None,
        type(model).__name__,
        str(getattr(model, "dtype", "")).removeprefix("torch.") or None,
        _weights(model),
    )
    _compared.setdefault(model, set()).add(found)
    return found


def warn_of_other_weights(model: nn.Module, origin: ModelOrigin | None, *, stacklevel: int) -> None:
    """Warn, once for each model, if an intervention was made for a model with other weights.

    Nothing is known, and nothing is said, about weights that were loaded in another dtype or by another class.
    """
    model = unwrap(model)
    compared = _compared.setdefault(model, set())
    if origin is None or origin.weights is None or origin in compared:
        return
    found = origin_of(model)
    compared.add(origin)
    comparable = found.dtype == origin.dtype and origin.architecture in (None, found.architecture)
    if comparable and found.weights not in (None, origin.weights):
        warnings.warn(
            f"intervention: it was made for a model of the same shape with other weights ({origin}; this model: "
            f"{found}), such as another fine-tune; what was measured there may not hold here",
            stacklevel=stacklevel + 1,
        )


def _weights(model: nn.Module) -> str | None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return None  # offloaded weights would be read from the disk as a whole
    with contextlib.suppress(Exception):  # weights of any library; nothing depends on their digest
        return weights_digest(model)
    return None
