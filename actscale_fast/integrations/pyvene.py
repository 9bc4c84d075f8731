"""pyvene: an intervention class that multiplies, conversion in both directions, and one pass over each site.

`ScaleIntervention` is used in a pyvene config: one scalar per head at unit "h" (component head_attention_value_output
and others that pyvene splits by heads), one scalar in total at a whole site. `to_pyvene`, `from_pyvene` and
`load_pyvene` convert whole interventions. `accelerate` changes how one IntervenableModel edits all positions:

    pyvene      clone the site, gather, intervene, scatter back in place     6 to 9 passes over the site
    accelerate  y = h·(1 + α) + v                                            2 passes, no synchronisation

pyvene writes in place over what SDPA keeps for its backward pass, so under SDPA only the accelerated path has gradients
above the lowest edited layer.

pyvene removes every forward hook from the model in each call, so an `af.patch` silently has no effect during and after
it: use one of the two. Importing pyvene imports nnsight, which replaces `torch.Tensor.backward`: on the same line as a
`with` statement (of any context manager) `loss.backward()` does nothing; put it on a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._library import require

require("pyvene")

import pyvene  # noqa: E402
import torch  # noqa: E402
from pyvene.models.constants import CONST_INPUT_HOOK, split_head_and_permute  # noqa: E402
from pyvene.models.modeling_utils import HandlerList, get_dimension_by_component  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ..modules.handle import Handle  # noqa: E402
from ..ops import scale_heads  # noqa: E402
from ._pyvene_exchange import from_pyvene, load_pyvene, to_pyvene  # noqa: E402
from ._pyvene_kinds import ALL_DIMS, SIGNS, ScaleIntervention, added_vector, unknown_kind  # noqa: E402

__all__ = ["Accelerated", "ScaleIntervention", "accelerate", "from_pyvene", "load_pyvene", "to_pyvene"]

# pyvene finds the class of a saved config under this name.
ScaleIntervention.__module__ = __name__

Edit = Callable[[Tensor], Tensor]


def accelerate(intervenable: Any) -> Accelerated:
    """Edit each site in one pass where possible, until the `with` block ends or `.remove()` is called.

    Covered: `ScaleIntervention`, pyvene's `ZeroIntervention`, and `AdditionIntervention` and `SubtractionIntervention`
    with one constant vector, at all positions (`unit_locations=None`, or unit "h" with the same heads in every row).
    Everything else uses pyvene's own path; `Accelerated.paths` gives the reason.

    Args:
        intervenable: a pyvene.IntervenableModel. Results and gradients equal its own up to rounding.

    Raises:
        TypeError, ValueError: not an IntervenableModel, or one that is accelerated already.

    Example:
        >>> with accelerate(intervenable):
        ...     _, steered = intervenable(base=inputs)
    """
    if not isinstance(intervenable, pyvene.IntervenableModel):
        raise TypeError(f"intervenable: got {type(intervenable).__name__}, expected a pyvene.IntervenableModel")
    return Accelerated(intervenable)


class Accelerated(Handle):
    """The handle of `accelerate`."""

    def __init__(self, intervenable: Any) -> None:
        self._intervenable: Any = intervenable
        self._there = intervenable.__dict__.get("_intervention_setter")
        if isinstance(getattr(self._there, "__self__", None), Accelerated):
            raise ValueError("intervenable: is accelerated already, expected one that is not")
        self._stock = intervenable._intervention_setter
        self._indices: dict[tuple[Any, ...], Tensor] = {}
        self._limits: dict[str, tuple[Any, int | None]] = {}
        #: For every intervention "fused", or why pyvene's own path is used (in the last call).
        self.paths = {key: self._unknown(key) or "fused" for key in intervenable.interventions}
        intervenable.__dict__["_intervention_setter"] = self._setter

    def remove(self) -> None:
        """Restore pyvene's own path; a second call does nothing."""
        intervenable, self._intervenable = self._intervenable, None
        if intervenable is None:
            return
        if self._there is None:
            intervenable.__dict__.pop("_intervention_setter", None)
        else:
            intervenable.__dict__["_intervention_setter"] = self._there

    def _setter(
        self, keys: list[str], unit_locations_base: Any, subspaces: Any, intervention_additional_kwargs: Any
    ) -> Any:
        """Replaces `IntervenableModel._intervention_setter`: registers the hooks for these keys."""
        handlers = HandlerList([])
        for number, key in enumerate(keys):
            locations, subspace = unit_locations_base[number], None if subspaces is None else subspaces[number]
            edit, reason = None, self._unknown(key)
            if not reason and (subspace is not None or intervention_additional_kwargs):
                reason = "subspaces or further arguments in the call"
            if not reason:
                edit, reason = self._edit(key, locations)
            self.paths[key] = reason or "fused"
            if edit is not None:
                handlers.extend(HandlerList([self._hooked(key, edit)]))
            else:
                given = None if subspaces is None else [subspace]
                handlers.extend(self._stock([key], [locations], given, intervention_additional_kwargs))
        return handlers

    def _hooked(self, key: str, edit: Edit) -> Any:
        register = self._intervenable.intervention_hooks[key]
        state = self._intervenable._intervention_state[key]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state.inc_setter_version()
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: edit(kwargs[name])}

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            state.inc_setter_version()
            if isinstance(output, dict):  # a ModelOutput
                first = next(iter(output))
                output[first] = edit(output[first])
                return output
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return register(before if register.__name__ == CONST_INPUT_HOOK else after, with_kwargs=True)

    def _unknown(self, key: str) -> str:
        """Why an intervention is not covered in any call; empty if it may be."""
        intervenable = self._intervenable
        intervention = intervenable.interventions[key]
        if unknown_kind(type(intervention)):
            return unknown_kind(type(intervention))
        if intervenable.as_adaptor or not intervenable.is_model_stateless:
            return "an adaptor, or a model with a state"
        if key in intervenable._intervention_reverse_link:
            return "linked with other interventions"
        if isinstance(intervention, ScaleIntervention) and self._n_dims(key, intervention) not in (None, ALL_DIMS):
            return "limited to some dimensions"
        if type(intervention) in SIGNS:
            source = getattr(intervention, "source_representation", None)
            if source is None or not intervention.is_source_constant:
                return "its source comes with the call"
            if source.numel() != source.shape[-1]:
                return "its source is not one vector"
        return ""

    def _edit(self, key: str, locations: Any) -> tuple[Edit | None, str]:
        """The edit for one call, or None and the reason."""
        intervenable = self._intervenable
        intervention, representation = intervenable.interventions[key], intervenable.representations[key]
        learned = intervention.alpha.numel() if isinstance(intervention, ScaleIntervention) else None
        n_dims = self._n_dims(key, intervention)
        if locations is None:
            if learned:
                return lambda x: intervention(x), ""
            return lambda x: _edited(intervention, n_dims, x, 1, None, None), ""
        if representation.unit != "h":
            return None, f"positions in the call (unit {representation.unit!r})"
        if intervenable._is_generation:
            return None, "heads in a call of generate(), which steers the prompt or the generated tokens"
        split = pyvene.type_to_module_mapping.get(intervenable.model_type, {}).get(representation.component, ())[2:]
        if len(split) != 1 or split[0][0] is not split_head_and_permute:
            return None, f"component {representation.component!r} is not split by heads alone"
        n_heads = get_dimension_by_component(intervenable.model_type, intervenable.model_config, split[0][1])
        rows = {tuple(row) for row in locations}
        if len(rows) != 1:
            return None, "other heads in each row"
        heads = rows.pop()
        if len(set(heads)) != len(heads) or (learned or len(heads)) != len(heads) or not {*heads} <= {*range(n_heads)}:
            return None, f"heads {heads} of {n_heads}"
        run = index = None
        if heads != tuple(range(n_heads)):
            index = self._index(heads, intervenable.get_device())
            # In place, few heads are read and written twice, which is less than reading and writing all of them once.
            if heads == tuple(range(heads[0], heads[-1] + 1)) and 2 * len(heads) <= n_heads:
                run = slice(heads[0], heads[-1] + 1)
        return lambda x: _edited(intervention, n_dims, x, n_heads, index, run), ""

    def _index(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        if (heads, device) not in self._indices:
            self._indices[heads, device] = torch.tensor(heads, device=device)
        return self._indices[heads, device]

    def _n_dims(self, key: str, intervention: Any) -> int | None:
        """The number of dimensions that an intervention is limited to; read once, as it may be on the device."""
        there = intervention.interchange_dim
        if key not in self._limits or self._limits[key][0] is not there:
            self._limits[key] = there, None if there is None else int(there)
        return self._limits[key][1]


def _edited(
    intervention: Any, n_dims: int | None, x: Tensor, n_heads: int, index: Tensor | None, run: slice | None
) -> Tensor:
    """x [B, T, H·D], edited at all positions: every head, or those of `index`; `run` is `index` as a slice.

    With one head, x is [..., D]: OPT flattens rows and tokens, and a norm per head (Qwen 3) gets [B, T, H, D].
    Like pyvene, a run of heads is edited in place if nothing needs a gradient.
    """
    if x.dim() != 3 and n_heads == 1:
        flat = x.reshape(1, -1, x.shape[-1])
        return _edited(intervention, n_dims, flat, n_heads, index, run).reshape(x.shape)
    heads = x.unflatten(-1, (n_heads, -1))
    kind, count = type(intervention), n_heads if index is None else len(index)
    if kind is pyvene.ZeroIntervention:
        zeroed = heads.clone()
        zeroed[:, :, slice(None) if index is None else index, :n_dims] = 0
        return zeroed.flatten(2)
    alpha = shift = None
    if kind is ScaleIntervention:
        alpha = intervention.alpha
    else:
        shift = added_vector(kind, intervention.source_representation, n_dims).expand(count, -1)
    values = shift if alpha is None else alpha
    assert values is not None
    if run is not None and not (torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)):
        heads[:, :, run] = _scaled(heads[:, :, run], alpha, shift)
        return x
    if index is not None:
        values = values.new_zeros(n_heads, *values.shape[1:]).index_copy(0, index, values)
    return _scaled(heads, None if alpha is None else values, None if shift is None else values).flatten(2)


def _scaled(heads: Tensor, alpha: Tensor | None, shift: Tensor | None) -> Tensor:
    """heads [B, T, H, D] with α [H] and v [H, D]."""
    return scale_heads(
        heads, None if alpha is None else alpha[None, None], shift=None if shift is None else shift[None, None]
    )
