"""Sites whose module was named by its path, where another library only knows sites by its own names."""

from __future__ import annotations

from ..architectures.families import FAMILIES
from ..architectures.location import Location


def refuse_named_module(argument: str, location: Location, target: str) -> None:
    """Raise a ValueError if a site is a module that `target` may not mean by its name for the site.

    The modules that a family's row of the table names are accepted. For a family without a row these are `mlp` and any
    projection, which has to be named there.
    """
    path, family = location.named_module, FAMILIES.get(location.model.model_type)
    if path is None:
        return
    if family is not None:
        usual = family.mlp if location.site == "mlp_out" else family.projection
    else:
        usual = "mlp" if location.site == "mlp_out" else path
    if path != usual:
        raise ValueError(
            f"{argument}: its site {location.site!r} is the module {path!r}, but {target} may edit another one there; "
            "use patch"
        )
