"""Where a learned intervention comes from: versions, date, the model's weights, the examples and the objective."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..architectures.model_origin import ModelOrigin, origin_of, public_name
from ..interventions import Intervention, load_intervention
from ..tasks.examples import example_fields
from .record import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..learning import Objective
    from ..tasks.examples import Example


def provenance(
    model: PreTrainedModel, train: Sequence[Example], test: Sequence[Example], objective: Objective | None = None
) -> dict[str, Any]:
    """What a record says beside the options: enough to tell whether a run can be repeated.

    Args:
        model: the model that was learned on.
        train, test: the examples that were learned from, and those that were held out.
        objective: as it was used, with numbers where shares were given; None: there is none.
    """
    origin = origin_of(model, collective=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "versions": {"actscale_fast": __version__, "python": platform.python_version(), **versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": origin.dtype,
        "weights": origin.weights,
        "examples": {"train": examples_record(train), "test": examples_record(test)},
        "objective": None if objective is None else asdict(objective) | {"directions": list(objective.directions)},
    }


def load_saved(folder: str | Path) -> Intervention:
    """`load_intervention`; what was saved before `intervention.json` named the model takes it from the fit's record."""
    intervention = load_intervention(folder)
    if any(part.location.origin is None for part in intervention.singles):
        with contextlib.suppress(ValueError):  # a damaged record is no reason to refuse the intervention
            origin = _origin_in(read_record(Path(folder)))
            for part in intervention.singles:
                if part.location.origin is None and origin != ModelOrigin():
                    part.set_origin(origin)
    return intervention


def _origin_in(record: dict[str, Any]) -> ModelOrigin:
    """What a record says about the model; a ValueError if it is damaged."""
    versions = record.get("versions")
    known = {"dtype": record.get("dtype"), "weights": record.get("weights"), "name": public_name(record.get("model"))}
    known["transformers"] = versions.get("transformers") if isinstance(versions, dict) else None
    return ModelOrigin.from_dict(known)


def examples_record(examples: Sequence[Example]) -> dict[str, Any]:
    """The number of some examples, and a digest of them."""
    content = json.dumps([example_fields(example) for example in examples], ensure_ascii=False)
    return {"n": len(examples), "sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()}
