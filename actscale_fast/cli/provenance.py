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

from .._log import logger
from .._version import __version__
from ..learning.weights_digest import weights_digest
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
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "versions": {"actscale_fast": __version__, "python": platform.python_version(), **versions},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": _dtype(model),
        "weights": _weights(model),
        "examples": {"train": _examples(train), "test": _examples(test)},
        "objective": None if objective is None else asdict(objective) | {"directions": list(objective.directions)},
    }


def warn_of_other_weights(folder: str | Path, model: PreTrainedModel) -> None:
    """Print a warning if an intervention was learned on other weights, such as those of another fine-tune.

    Weights that are loaded in another dtype cannot be compared. Without an intact record nothing is printed.
    """
    record: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        record = read_record(Path(folder))
    known = record.get("weights")
    if known is None or record.get("dtype") != _dtype(model):
        return
    found = _weights(model)
    if found not in (None, known):
        logger.warning(
            f"{folder} was fitted on a model of the same shape with other weights (digest {known}, this model's is "
            f"{found}), such as another fine-tune; its figures may not hold here"
        )


def _examples(examples: Sequence[Example]) -> dict[str, Any]:
    content = json.dumps([example_fields(example) for example in examples], ensure_ascii=False)
    return {"n": len(examples), "sha256": hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()}


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _weights(model: PreTrainedModel) -> str | None:
    """The digest of the model's weights; None: they cannot be read."""
    try:
        return weights_digest(model)
    except ValueError:
        return None
