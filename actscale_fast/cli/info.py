"""`actscale-fast info`: what a saved intervention is."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .._json import parsed_sealed, read_limited
from .._tables import ranges
from ..interventions import ActivScalar, Intervention, load_intervention
from ..interventions.description import DESCRIPTION, read_description
from .output import print_table
from .record import FILE

#: Fields of a fit's record that are not shown: long, or shown elsewhere.
_HIDDEN = ("format", "intervention", "kind", "examples", "objective")


def info(options: argparse.Namespace) -> int:
    """Print what the folder holds: kind, model, places, active parameters, the largest scalars and the fit's record."""
    folder = Path(options.folder)
    intervention = load_intervention(folder)
    fields = read_description(folder).fields
    record = _record(folder)
    saved = datetime.fromtimestamp((folder / DESCRIPTION).stat().st_mtime, UTC).isoformat(timespec="seconds")
    rows = [["kind", type(intervention).__name__], *_place(intervention)]
    rows += [
        ["active", f"{intervention.n_active} of {intervention.n_parameters}"],
        ["ℓ1 norm", f"{intervention.l1:.4g}"],
    ]
    rows += [["strength", f"{fields['strength']:g}"]] if "strength" in fields else []
    rows += [["file written", saved]] if "date" not in record else []
    rows += [[name.replace("_", " "), _text(value)] for name, value in record.items() if _is_shown(name, value)]
    print_table(str(folder), ("", ""), rows, right=False)
    columns, largest = intervention.table()
    if largest:
        print_table("Largest", columns, largest)
    options.result = {
        "folder": str(folder),
        "kind": type(intervention).__name__,
        "parts": [_as_json(factor, part) for factor, part in intervention.pairs],
        "n_active": intervention.n_active,
        "n_parameters": intervention.n_parameters,
        "l1": intervention.l1,
        "strength": fields.get("strength"),
        "written": saved,
        "record": record or None,
    }
    return 0


def _place(intervention: Intervention) -> list[list[str]]:
    parts = intervention.singles
    if len(parts) > 1:
        return [[f"part {number}", part._heading()] for number, part in enumerate(parts, 1)]
    where = parts[0].location
    model = where.model
    shape = f"{model.model_type}, {model.n_layers} layers, {model.n_heads} heads of {model.head_dim}"
    rows = [["architecture", shape], *([] if where.origin is None else [["made for", str(where.origin)]])]
    return [*rows, ["site", where.site_name], ["layers", ranges(where.layers)], ["positions", where.tokens]]


def _as_json(factor: float, part: Intervention) -> dict[str, Any]:
    found: dict[str, Any] = {"factor": factor, "kind": type(part).__name__, "n_groups": part.n_groups}
    largest = [row._asdict() for row in part.top()] if isinstance(part, ActivScalar) else None
    origin = part.location.origin
    found |= {"location": part.location.to_dict(), "model": None if origin is None else origin.to_dict()}
    return found | {"n_active": part.n_active, "largest": largest}


def _record(folder: Path) -> dict[str, Any]:
    """The record of the fit beside the intervention; empty if there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        record, _ = parsed_sealed(read_limited(folder / FILE), finite=False)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{folder / FILE}: damaged, or not the record of a fit ({error})") from None
    return record if isinstance(record, dict) else {}


def _is_shown(name: str, value: Any) -> bool:
    return name not in _HIDDEN and value is not None and value is not False and value != {}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "yes" if value is True else str(value)
