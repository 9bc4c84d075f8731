"""Writing an intervention into a model's weights, and restoring the original weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import site_check
from ..architectures.families import FAMILIES
from ..architectures.hugging_face import unwrap
from ..architectures.layout import ModelLayout, layout
from ..architectures.model_origin import warn_of_other_weights
from ..architectures.sharding import local, own_part, reshard, storages, stored_as
from ..interventions import ActivScalar, Intervention, SteerVec
from .edits import one_strength

_MERGED = "_actscale_fast_merged"  # on the model: parameter name -> original value, on the CPU
#: The last projection of the MLPs in the table of families.
_LAST = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")


def merge(model: nn.Module, intervention: Intervention, strength: float | Tensor = 1.0) -> None:
    """Write an intervention into the model's weights, so that it costs nothing at run time.

    Exact up to one rounding of each changed weight to its dtype (about 3 significant digits in bfloat16, where `patch`
    rounds the activation instead). An ActivScalar scales the projection's input columns (site head) or its output rows
    and bias (attn_out, mlp_out). A SteerVec adds to the bias. A Composite of these is merged part by part, with one
    rounding for each. The original weights are kept on the CPU for `unmerge`.

    Args:
        model: the model that the intervention was made for.
        intervention: an unstacked ActivScalar or SteerVec with positions=None, or a Composite of these.
        strength: β, one number.

    Raises:
        TypeError, ValueError: what weights cannot express (positions, the residual site, stacks, a missing bias,
            experts), quantised, offloaded or shared weights, non-finite values, another model, or a model that has been
            merged already. The model is then unchanged.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(f"intervention: got {type(intervention).__name__}, expected an Intervention")
    if isinstance(strength, Tensor) and strength.dim() > 0:
        raise ValueError("strength: got one value per row, expected one number: the weights serve all rows")
    beta = one_strength(strength, "one number")
    parts = intervention.pairs
    for _, part in parts:
        _check_mergeable(part)
    found = layout(model, intervention.paths)
    reshard(found.model)
    if _MERGED in found.model.__dict__:
        raise ValueError("model: an intervention is merged already; unmerge it first")
    names = {module: name for name, module in found.model.named_modules()}
    updates: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for factor, part in parts:
        part.location.model.require(found.fingerprint)
        warn_of_other_weights(found.model, part.location.origin, stacklevel=2)
        part.check_finite()
        own = layout(model, part.paths)
        site_check.require_site(own, part.location.site, part.location.layers)
        for index, layer in enumerate(part.location.layers):
            module = site_projection(own, part.location.site, layer)
            name = names[module]
            before = {key: updates[f"{name}.{key}"][1] for key in ("weight", "bias") if f"{name}.{key}" in updates}
            for key, value in _updated(module, name, before, part, index, factor * beta).items():
                updates[f"{name}.{key}"] = (getattr(module, key), value)
    _refuse_shared(found.model, updates)
    originals = {name: local(parameter).to("cpu", copy=True) for name, (parameter, _) in updates.items()}
    try:
        with torch.no_grad():
            for parameter, value in updates.values():
                _overwrite(parameter, value)
    except BaseException:
        _restore(found.model, originals)
        raise
    found.model.__dict__[_MERGED] = originals


def _check_mergeable(intervention: Intervention) -> None:
    """Raise a ValueError for what weights cannot express."""
    location = intervention.location
    if location.positions is not None:
        raise ValueError("intervention: it has positions, but weights act on every token; use patch")
    if location.site == "residual":
        raise ValueError("intervention: no single weight produces the residual stream; use patch")
    if intervention.n_groups is not None:
        raise ValueError(
            "intervention: a stack acts by row group, but the weights serve all rows; merge one of its parts"
        )
    if not isinstance(intervention, ActivScalar | SteerVec):
        raise ValueError(f"intervention: {type(intervention).__name__} depends on the activation; use patch")


def unmerge(model: nn.Module) -> None:
    """Restore, bit for bit, the weights that `merge` changed.

    Raises:
        ValueError: nothing is merged.
    """
    inner = unwrap(model)
    if _MERGED not in inner.__dict__:
        raise ValueError("model: no intervention is merged")
    reshard(inner)
    _restore(inner, inner.__dict__[_MERGED])
    del inner.__dict__[_MERGED]


def _restore(model: nn.Module, originals: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in originals.items():
            _overwrite(model.get_parameter(name), value)


def _overwrite(parameter: Tensor, value: Tensor) -> None:
    """Write into a parameter, or into the part of a sharded one that this process holds."""
    (local(parameter) if stored_as(parameter) == "sharded" else parameter).copy_(value)


def site_linear(found: ModelLayout, site: str, layer: int) -> nn.Module:
    """The module where the linear layer of a site is expected, whatever its class."""
    module = found.site_module(site, layer)
    if site == "mlp_out" and not hasattr(module, "weight"):
        parts = [getattr(module, name) for name in _LAST if isinstance(getattr(module, name, None), nn.Module)]
        if found.model_type not in FAMILIES or len(parts) != 1:
            raise ValueError(
                f"intervention: layer {layer}'s MLP ({type(module).__name__}) does not end in one known projection; "
                "use patch"
            )
        module = parts[0]
    return module


def site_projection(found: ModelLayout, site: str, layer: int) -> nn.Module:
    """The linear layer whose weights can express an intervention at a site."""
    module = site_linear(found, site, layer)
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        raise ValueError(
            f"model: layer {layer}'s projection is a {type(module).__name__}, expected nn.Linear or Conv1D"
        )
    usable = isinstance(weight, Tensor) and weight.is_floating_point()
    if not usable or stored_as(weight) not in ("plain", "sharded"):
        kind = "" if type(weight) in (Tensor, nn.Parameter) else f"a {type(weight).__name__} of "
        state = "missing" if not isinstance(weight, Tensor) else f"{kind}{weight.dtype} on {weight.device}"
        hint = "; what is quantised or sharded cannot hold the product exactly: use patch" if kind else ""
        raise ValueError(
            f"model: the weight of layer {layer}'s projection is {state}, expected floating-point and in memory{hint}"
        )
    return module


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _updated(
    module: Any, name: str, before: dict[str, Tensor], intervention: Intervention, index: int, strength: float
) -> dict[str, Tensor]:
    """The new weight and bias of one projection, computed in float32 or wider and rounded once.

    Of a sharded projection, the parts that this process holds.

    Args:
        module, name: the projection.
        before: its weight and bias where earlier parts have changed them.
        intervention, index: an ActivScalar or SteerVec, and the layer's index in it.
        strength: β.
    """
    weight: Tensor = before.get("weight", local(module.weight))
    bias: Tensor | None = None if module.bias is None else before.get("bias", local(module.bias))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    location = intervention.location
    if isinstance(intervention, SteerVec):
        if location.site == "head" or bias is None:
            reason = "the head site has no bias" if location.site == "head" else f"{name} has no bias"
            raise ValueError(f"intervention: a steering vector adds to a bias, but {reason}; use patch")
        vector = intervention.vectors.detach()[index].reshape(-1).to(bias.device, wide)
        return {"bias": (bias.to(wide) + strength * own_part(vector, module.bias)).to(bias.dtype)}
    assert isinstance(intervention, ActivScalar)
    own = intervention.of_layer(intervention.alpha.detach(), index, weight.device)
    scale = 1 + strength * own.reshape(-1).to(wide)  # [H] or [1]
    inputs_first = _is_conv1d(module)  # Conv1D keeps [in, out], nn.Linear [out, in]
    if location.site == "head":
        columns = scale.repeat_interleave(module.weight.shape[0 if inputs_first else 1] // len(scale))
        columns = own_part(columns[:, None] if inputs_first else columns, module.weight)
        return {"weight": (weight.to(wide) * columns).to(weight.dtype)}
    result = {"weight": (weight.to(wide) * scale).to(weight.dtype)}
    if bias is not None:
        result["bias"] = (bias.to(wide) * scale.to(bias.device)).to(bias.dtype)
    return result


def _refuse_shared(model: nn.Module, updates: dict[str, Any]) -> None:
    """Refuse to change a tensor that is also used elsewhere; views of one storage count as shared."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for storage, _ in storages(parameter):
            owners.setdefault(storage, []).append(name)
    for name, (parameter, _) in updates.items():
        others = [other for storage, _ in storages(parameter) for other in owners[storage] if other != name]
        if others:
            raise ValueError(f"model: {name} shares its memory with {', '.join(others)}, so it cannot be changed alone")
