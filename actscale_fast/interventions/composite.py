"""Combinations of interventions: one after the other, with factors of the strength, or side by side in row groups."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from .._checks import check_finite, is_real
from .._files import write_bytes
from ..architectures.location import Location
from . import saving
from .base import Intervention, read_part
from .description import (
    DESCRIPTION,
    Description,
    checked_sha256,
    description_bytes,
    number,
    read_description,
)

#: The most parts of a Composite that can be saved or loaded.
_MOST_PARTS = 1024


class Composite(Intervention):
    """Several interventions, each with its own factor of the strength, applied in order like nested patches.

    Two scalings of one head multiply, (1 + β·α₁)(1 + β·α₂); vectors add. `a + b`, `a - b` and `0.5 * a` return a
    Composite where the result is not an intervention of the parts' own class. It is patched, fitted, evaluated and
    saved like any other: `for_model(..., site="attn_out") + for_model(..., site="mlp_out")` are learned together.

    Args:
        parts: pairs of a factor and an intervention; all are stacks of one size, or none is a stack.

    Raises:
        TypeError, ValueError: no parts, a part that is not an intervention, a factor that is not finite, parts made for
            different models, or stacks of different sizes.
    """

    parts: nn.ModuleList

    def __init__(self, parts: Iterable[tuple[float, Intervention]]) -> None:
        nn.Module.__init__(self)
        flat: list[tuple[float, Intervention]] = []
        for factor, part in parts:
            _check_part(part)
            _check_factor(factor)
            flat += [(factor * other, one) for other, one in part.pairs]
        if not flat:
            raise ValueError("parts: got none, expected at least one intervention")
        for _, part in flat[1:]:
            flat[0][1].location.model.require(part.location.model)
        sizes = {part.n_groups for _, part in flat}
        if len(sizes) > 1:
            raise ValueError(f"parts: got stacks of {sorted(map(str, sizes))}, expected one number of row groups")
        self.factors = tuple(float(factor) for factor, _ in flat)
        self.parts = nn.ModuleList(part for _, part in flat)
        self.n_groups = sizes.pop()

    @property
    def pairs(self) -> list[tuple[float, Intervention]]:
        return list(zip(self.factors, self.parts, strict=True))  # type: ignore[arg-type]

    @property
    def location(self) -> NoReturn:  # type: ignore[override]
        raise TypeError(f"intervention: a Composite of {len(self.parts)} has no single location; see its .parts")

    @property
    def device(self) -> torch.device:
        return self.singles[0].device

    @property
    def n_parameters(self) -> int:
        return sum(single.n_parameters for single in dict.fromkeys(self.singles))

    @property
    def n_active(self) -> int:
        return sum(single.n_active for single in dict.fromkeys(self.singles))

    @property
    def l1(self) -> float:
        return sum(single.l1 for single in dict.fromkeys(self.singles))

    def write_data(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Write each part into a subfolder named after its contents; a part that occurs twice is written once."""
        if len(self.parts) > _MOST_PARTS:
            raise ValueError(f"parts: got {len(self.parts)}, expected at most {_MOST_PARTS} in a Composite to be saved")
        written: dict[Intervention, tuple[str, str]] = {}
        listed: list[dict[str, Any]] = []
        for factor, part in self.pairs:
            if part not in written:
                encoded = saving.encode(type(part), part.location, part.n_groups, part.saved_tensors())
                raw = description_bytes(encoded.description)
                digest = hashlib.sha256(raw).hexdigest()
                alike = sum(other == digest for _, other in written.values())  # an equal but separate part
                name = f"part-{digest[:16]}" + (f"-{alike + 1}" if alike else "")
                write_bytes(folder / name / encoded.name, encoded.payload)
                write_bytes(folder / name / DESCRIPTION, raw)
                written[part] = name, digest
            name, digest = written[part]
            listed.append({"folder": name, "factor": factor, "sha256": digest})
        return {"class": type(self).__name__, "parts": listed}, [name for name, _ in written.values()]

    @classmethod
    def read(cls, description: Description) -> Self:
        listed = description.checked(lambda: _listed(description.fields))
        parts: dict[str, Intervention] = {}
        for name, _, digest in listed:
            if name not in parts:
                folder = description.folder / name
                if folder.is_symlink():
                    raise ValueError(f"{folder}: a link, expected a folder")
                part = read_description(folder, digest)
                if part.fields["class"] == cls.__name__:
                    raise ValueError(f"{part.path}: damaged, a {cls.__name__} cannot be part of another")
                parts[name] = read_part(part)
        return description.checked(lambda: cls([(factor, parts[name]) for name, factor, _ in listed]))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: one row per part."""
        rows = [
            [f"{factor:g}", part._heading(), f"{part.n_active} of {part.n_parameters}"] for factor, part in self.pairs
        ]
        return ["factor", "part", "active"], rows

    def _heading(self) -> str:
        return f"Composite of {len(self.parts)}"

    def extra_repr(self) -> str:
        return f"factors={list(self.factors)}"


def scaled(intervention: Intervention, factor: float) -> Intervention:
    """`factor * intervention`, of the same class where its parameters can absorb the factor."""
    _check_factor(factor)
    if isinstance(intervention, Composite) or not intervention.homogeneous:
        return Composite([(factor, intervention)])
    copy = type(intervention)(intervention.location, n_groups=intervention.n_groups, device=intervention.device)
    with torch.no_grad():
        for name, value in intervention.named_parameters():
            copy.get_parameter(name).copy_(factor * value).requires_grad_(value.requires_grad)
    return copy


def stack(interventions: Iterable[Intervention]) -> Intervention:
    """Combine interventions of one class into one with row groups; `patch(..., group=)` assigns a part to each row.

    They may differ in layers, and in positions if all are counted from the same end of the prompt; where a part has no
    parameter of its own, it does nothing.

    Args:
        interventions: at one site of one model; none is a stack itself.

    Raises:
        ValueError: no interventions, several classes, stacks among them, or positions that cannot be combined.

    Example:
        >>> both = stack([love, hate])
        >>> with patch(model, both, group=torch.tensor([0, 1])):  # row 0 gets the first, row 1 the second
        ...     model.generate(**two_prompts)
    """
    parts = list(interventions)
    for part in parts:
        _check_part(part)
    kinds = {type(part) for part in parts}
    if len(kinds) != 1 or any(part.n_groups is not None for part in parts):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise ValueError(f"interventions: got {names}, expected unstacked ones of one class")
    cls = kinds.pop()
    if cls is Composite or cls.needs_source:
        raise ValueError(f"interventions: a {cls.__name__} cannot be stacked")
    locations = [part.location for part in parts]
    if cls.shares_positions and len({(location.positions, location.generated) for location in locations}) > 1:
        raise ValueError("interventions: their positions differ, but this class shares its parameters between them")
    stacked = cls(common_location(locations), n_groups=len(parts), device=parts[0].device)
    with torch.no_grad():
        for number, part in enumerate(parts):
            place_in(stacked, part, number)
    return stacked


def _module(location: Location) -> str:
    paths = ", ".join(f"{name}={path!r}" for name, path in location.paths.items())
    return repr(location.site) + (f" ({paths})" if paths else "")


def common_location(locations: Sequence[Location]) -> Location:
    """The smallest location that contains all of these.

    Raises:
        ValueError: several sites or models, some with positions and some without, or different positions counted from
            both ends of the prompt: in a short prompt two of them could be the same token.
    """
    first = locations[0]
    if all(location == first for location in locations):
        return first
    for location in locations[1:]:
        first.model.require(location.model)
        if location.module_key != first.module_key:
            raise ValueError(
                f"interventions: got the sites {_module(first)} and {_module(location)}, expected one site, with the "
                "same paths"
            )
    layers = first.layers
    if any(location.layers != layers for location in locations):
        layers = tuple(sorted({layer for location in locations for layer in location.layers}))
    positions = first.positions
    if any(location.positions != positions for location in locations):
        if any(location.positions is None for location in locations):
            raise ValueError("interventions: some steer every token and some listed positions, expected one kind only")
        every = sorted({position for location in locations for position in location.positions or ()})
        if any(position < 0 for position in every) and any(position >= 0 for position in every):
            raise ValueError("interventions: their positions differ and are counted from both ends of the prompt")
        positions = tuple(every)
    return replace(
        first, layers=layers, positions=positions, generated=any(location.generated for location in locations),
        heads={layer: sizes for location in locations for layer, sizes in location.heads.items()},
    )  # fmt: skip


def place_in(whole: Intervention, part: Intervention, group: int | None = None) -> None:
    """Add the parameters of a part to those of an intervention at a larger location, in one of its groups."""
    there, here = whole.location, part.location
    layers = [there.layers.index(layer) for layer in here.layers]
    slots = [0]
    if here.positions is not None and not part.shares_positions:
        assert there.positions is not None
        slot_of = {position: slot for slot, position in enumerate(there.positions)}
        slots = [slot_of[position] for position in here.positions]
        slots += [there.n_slots - 1] * here.generated
    rows, columns = torch.tensor(layers, device="cpu")[:, None], torch.tensor(slots, device="cpu")[None]
    for name, value in part.named_parameters():
        if not value.requires_grad:
            whole.get_parameter(name).requires_grad_(False)
        target = whole.get_parameter(name).data
        target = target if group is None else target[group]
        target[rows, columns] += value.to(target.device)


def _listed(fields: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(folder, factor, SHA-256 of its description) of each part; raises ValueError, KeyError or TypeError."""
    entries = fields["parts"]
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_PARTS:
        got = f"{len(entries)} of them" if isinstance(entries, list) else type(entries).__name__
        raise ValueError(f"parts: got {got}, expected a list of 1 to {_MOST_PARTS}")
    listed = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {"folder", "factor", "sha256"}:
            raise ValueError(f"parts: number {index} needs exactly a folder, a factor and a sha256")
        digest = checked_sha256(entry["sha256"])
        wanted = rf"part-{digest[:16]}(-[1-9]\d{{0,3}})?" if fields["format"] > 1 else f"part-{index}"
        if not isinstance(entry["folder"], str) or not re.fullmatch(wanted, entry["folder"]):
            raise ValueError(f"parts: the folder of number {index} is {ascii(entry['folder'])[:80]}")
        listed.append((entry["folder"], number("factor", entry["factor"]), digest))
    return listed


def _check_part(part: object) -> None:
    if not isinstance(part, Intervention):
        raise TypeError(f"interventions: got {type(part).__name__}, expected an Intervention")


def _check_factor(factor: object) -> None:
    if not is_real(factor):
        raise TypeError(f"factor: got {type(factor).__name__}, expected a number")
    check_finite(factor=factor)
