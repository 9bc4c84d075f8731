"""The points of a sweep's grid: each has an objective, settings, a starting point and a folder name."""

from __future__ import annotations

import copy
import itertools
import json
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..._suggestions import did_you_mean
from ...architectures.layout import ModelLayout
from ...architectures.location import check_layers
from ...interventions import Intervention
from ..checkpoint import digest
from ..fit_settings import FitSettings
from ..objective import Objective

Grid = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]] | Sequence[Intervention]

_OF_OBJECTIVE = tuple(item.name for item in fields(Objective))
_OF_SETTINGS = tuple(item.name for item in fields(FitSettings))
_KEYS = (*_OF_OBJECTIVE, *_OF_SETTINGS, "layers", "task")


@dataclass(slots=True)
class Point:
    """One fit of a sweep before it has begun."""

    chosen: dict[str, Any]  # what the grid says about it
    task: str | None
    objective: Objective
    settings: FitSettings
    intervention: Intervention
    after: Point | None = None  # the point whose result it starts from
    identity: dict[str, Any] = field(default_factory=dict)
    error: str | None = None  # why it cannot begin
    known_weight: float | None = None  # λ_M as another job of the same sweep resolved it
    family: str = ""  # a digest of what all points of its grid have in common
    sizes: list[Tensor | None] = field(default_factory=list)  # of the activations, where the learning rate is a share

    @property
    def label(self) -> str:
        """What the grid says, in one line."""
        return ", ".join(f"{name}={_short(value)}" for name, value in self.chosen.items()) or "single"

    @property
    def folder(self) -> str:
        """The name of its folder: the label and a digest of everything that determines the result."""
        readable = re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)[:80]
        return f"{readable}-{digest(self.identity)[:10]}"


def points(
    grid: Any, template: Intervention | None, objective: Objective, settings: FitSettings, tasks: Sequence[str | None],
    found: ModelLayout,
) -> list[Point]:  # fmt: skip
    """The points of a grid, in its order.

    Args:
        grid: as `sweep` takes it.
        template: the starting point of points that have none of their own.
        objective, settings: those of all points, except for what the grid says.
        tasks: the names of the sets of examples; (None,) for one without a name.
        found: the model's layout.

    Raises:
        TypeError, ValueError: a grid of another type, an unknown key or task, or a value that the objective or the
            settings refuse.
    """
    made: list[Point] = []
    for given in _listed(grid):
        if isinstance(given, Intervention):
            start, chosen = given, {"start": len(made)}
            named: dict[str, Any] = {}
        else:
            assert template is not None
            named = {name: _plain(value) for name, value in given.items()}
            start, chosen = template, dict(named)
        unknown = [name for name in named if name not in _KEYS]
        if unknown:
            raise ValueError(
                f"grid: got {', '.join(map(repr, unknown))}, expected among {', '.join(_KEYS)}"
                + did_you_mean(unknown[0], _KEYS)
            )
        changes = {name: value for name, value in named.items() if name in _OF_OBJECTIVE}
        steps = {name: value for name, value in named.items() if name in _OF_SETTINGS}
        if "layers" in named:
            start = _restricted(start, named["layers"], found)
        wanted = [named["task"]] if "task" in named else list(tasks)
        for task in wanted:
            if task not in tasks:
                raise ValueError(f"grid: got the task {task!r}, expected among {', '.join(map(repr, tasks))}")
            own = chosen if task is None else chosen | {"task": task}
            own_objective = replace(objective, **changes).for_intervention(start)
            own_settings = replace(settings, **steps).for_intervention(start)
            made.append(Point(own, task, own_objective, own_settings, copy.deepcopy(start)))
    if not made:
        raise ValueError("grid: got no points, expected at least one")
    return made


def chain_by_minimality(made: Sequence[Point]) -> list[list[Point]]:
    """Paths of points that differ only in λ_M, from the largest down; each starts where the previous one ended."""
    paths: dict[str, list[Point]] = {}
    for point in made:
        others = {name: value for name, value in point.chosen.items() if name != "minimality"}
        paths.setdefault(json.dumps(others, default=str, sort_keys=True), []).append(point)
    for path in paths.values():
        path.sort(key=lambda point: -point.objective.minimality_weight)
        for before, point in itertools.pairwise(path):
            point.after = before
    return list(paths.values())


def _listed(grid: Any) -> list[Any]:
    if isinstance(grid, Mapping):
        names = list(grid)
        for name in names:
            if isinstance(grid[name], str) or not isinstance(grid[name], Iterable):
                raise TypeError(f"grid: got {name}={grid[name]!r}, expected a list of values")
        return [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(list(grid[name]) for name in names))
        ]
    if isinstance(grid, Sequence) and not isinstance(grid, str):
        listed = list(grid)
        if all(isinstance(given, Mapping) for given in listed) or all(isinstance(g, Intervention) for g in listed):
            return listed
    raise TypeError(
        f"grid: got {type(grid).__name__}, expected a dict of lists, a list of dicts or a list of interventions"
    )


def _restricted(template: Intervention, layers: Any, found: ModelLayout) -> Intervention:
    """The template's values at the given layers, and 0 at layers that it does not have."""
    chosen = check_layers(layers, found.n_layers)
    heads = found.unusual_heads(template.location.site, chosen)
    location = replace(template.location, layers=chosen, heads=heads)
    made = type(template)(location, device=template.device)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            for place, layer in enumerate(location.layers):
                if layer in template.location.layers:
                    parameter[place] = template.get_parameter(name)[template.location.layers.index(layer)]
    return made


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number, for JSON."""
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def _short(value: Any) -> str:
    if isinstance(value, range):
        return f"{value.start}..{value.stop - 1}" if value.step == 1 and len(value) else "-".join(map(str, value))
    if isinstance(value, list | tuple):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
