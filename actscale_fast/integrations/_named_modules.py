"""Sites whose module was named by its path, where another library only knows sites by its own names."""

from __future__ import annotations

from ..architectures.families import FAMILIES
from ..architectures.location import Location


def refuse_named_module(argument: str, location: Location, target: str) -> None:
    """Raise a ValueError if a site is a module that `target` may not mean by its name for the site.

    A projection of a family that is not in the table is the attention's own, which the check of the model has shown.
    """
    key = "mlp" if location.site == "mlp_out" else "projection"
    path, family = location.paths.get(key), FAMILIES.get(location.model.model_type)
    if location.site == "residual" or path is None or path == getattr(family, key, path if key != "mlp" else None):
        return
    raise ValueError(
        f"{argument}: its site {location.site!r} is the module {key}={path!r}, but {target} would edit its own module "
        "there; use patch"
    )
