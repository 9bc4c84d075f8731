"""A Griffe extension: the API reference shows the values of defaults, not the names of their constants."""

from __future__ import annotations

from typing import Any

import griffe


class ShownDefaults(griffe.Extension):
    """`steps: int = 45` instead of `steps: int = STEPS`, for constants of this package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for part in walk(pkg):
            if isinstance(part, griffe.Function):
                for parameter in part.parameters:
                    parameter.default = value_of(parameter.default, pkg)
            elif isinstance(part, griffe.Attribute) and isinstance(part.parent, griffe.Class):  # a dataclass's field
                part.value = value_of(part.value, pkg)


def walk(part: Any) -> Any:
    """A module or class and all that is defined in it."""
    yield part
    for member in part.members.values():
        if not member.is_alias:
            yield from walk(member)


def value_of(default: Any, package: griffe.Module) -> Any:
    """The value of a default that is a constant of the package, else the default."""
    if not isinstance(default, griffe.Expr):
        return default
    path = default.canonical_path.removeprefix(f"{package.path}.")
    try:
        found = package[path]
        value = found.value
    except (AttributeError, KeyError, griffe.AliasResolutionError):
        return default
    return default if value is None else value
