"""Which model an intervention was made for, so that another fine-tune with the same shape can be told from it."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from .._json import shown
from .hugging_face import unwrap
from .sharding import own_class, stored_as
from .weights_digest import weights_digest

#: A longer name is neither saved nor read.
_LONGEST = 4096
#: The origins that a model was compared with already, or was found to have itself.
_compared: weakref.WeakKeyDictionary[nn.Module, set[ModelOrigin]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ModelOrigin:
    """A model's name and weights; None means unknown."""

    name: str | None = None  # on the Hugging Face hub, or that of the folder that it was loaded from
    architecture: str | None = None  # the class, such as "LlamaForCausalLM"
    dtype: str | None = None
    weights: str | None = None  # `weights_digest`
    transformers: str | None = None  # the version, which decides on the names and shapes of the weights
    quantisation: str | None = None  # the method and its bits, or "none"

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
                raise ValueError(f"model: got the {name} {shown(value)}, expected a string or null")
        return cls(**data)

    def __str__(self) -> str:
        known = [self.name or self.architecture, None if self.weights is None else f"digest {self.weights}"]
        return ", ".join(filter(None, known)) or "unknown"


def origin_of(model: nn.Module, *, collective: bool = False) -> ModelOrigin:
    """The origin of a model. Its weights are not known where reading them fails or would fetch them from elsewhere.

    Args:
        model: plain, quantised, offloaded or sharded.
        collective: whether all processes that hold a sharded model make this call; otherwise its weights are not known.
    """
    model = unwrap(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    found = ModelOrigin(
        public_name(name),
        own_class(model).__name__,
        str(getattr(model, "dtype", "")).removeprefix("torch.") or None,
        _weights(model, collective),
        getattr(sys.modules.get("transformers"), "__version__", None),
        _quantisation(model),
    )
    _compared.setdefault(model, set()).add(found)
    return found


def warn_of_other_weights(
    model: nn.Module, origin: ModelOrigin | None, *, stacklevel: int, collective: bool = False
) -> None:
    """Warn, once for each model, if an intervention was made for a model with other weights.

    `collective` is as in `origin_of`.

    Nothing is known, and nothing is said, about weights that were loaded in another dtype, by another class, quantised
    in another way or by another version of transformers, which may rename or fuse them.
    """
    model = unwrap(model)
    compared = _compared.setdefault(model, set())
    if origin is None or origin.weights is None or origin in compared:
        return
    found = origin_of(model, collective=collective)
    compared.add(origin)
    if _are_comparable(found, origin) and found.weights not in (None, origin.weights):
        same = "the same name, other weights; " if found.name is not None and found.name == origin.name else ""
        warnings.warn(
            f"intervention: it was made for a model of the same shape with other weights ({same}{origin}; this model: "
            f"{found}), such as another fine-tune; what was measured there may not hold here",
            stacklevel=stacklevel + 1,
        )


def public_name(name: object) -> str | None:
    """A model's name as it is saved: of a folder only the last component, as its place says nothing elsewhere."""
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        return None
    with contextlib.suppress(OSError, ValueError):
        if Path(name).is_absolute() or Path(name).is_dir():
            return Path(os.path.abspath(name)).name or None  # noqa: PTH100 (links keep their names)
    return name


def _are_comparable(first: ModelOrigin, second: ModelOrigin) -> bool:
    """Whether digests tell the weights apart: unless how they were loaded is known to differ."""
    names = ("architecture", "transformers", "quantisation")
    either = ((getattr(first, name), getattr(second, name)) for name in names)
    return first.dtype == second.dtype and all(None in pair or pair[0] == pair[1] for pair in either)


def _quantisation(model: nn.Module) -> str:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is not None:
        known = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
        method = known.get("quant_method")
        method = str(getattr(method, "value", method) or "unknown")
        # bitsandbytes keeps its flags with an underscore.
        bits = [n for n in ("4", "8") if known.get(f"load_in_{n}bit") or known.get(f"_load_in_{n}bit")]
        bits = bits or [str(known["bits"]) for _ in range(type(known.get("bits")) is int)]
        return ", ".join([method, *(f"{n} bits" for n in bits), *_kind(known)])[:_LONGEST]
    return "unknown" if any(stored_as(value) == "packed" for value in model.parameters()) else "none"


def _kind(settings: Mapping[str, Any]) -> list[str]:
    """What else tells two models of one method apart: the type of torchao's weights, or of quanto's."""
    kind = settings.get("quant_type", settings.get("weights"))
    kind = next(iter(kind.values()), None) if isinstance(kind, dict) else kind
    if isinstance(kind, dict):  # as saved in config.json
        kind = kind.get("_type")
    if kind is None:
        return []
    return [kind if isinstance(kind, str) else type(kind).__name__]


def _weights(model: nn.Module, collective: bool) -> str | None:
    if any(parameter.is_meta for parameter in model.parameters()):
        return None  # offloaded weights would be read from the disk as a whole
    with contextlib.suppress(Exception):  # weights of any library; nothing depends on their digest
        return weights_digest(model, collective=collective)
    return None
