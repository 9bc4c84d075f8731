"""TransformerLens: interventions as hook functions, and sweeps over heads in a few batches.

`hooks` returns what `run_with_hooks(fwd_hooks=...)` and `model.hooks(...)` take. The sites are those of the Hugging
Face model inside the bridge: head is `attn.hook_z` (already [B, T, H, D]), attn_out the output of `attn.o`, mlp_out
that of the MLP, and residual the block's output `hook_resid_post`. In families with a norm or multiplier after these
outputs (Gemma 2, OLMo 2, Granite), `hook_attn_out` and `hook_mlp_out` come after it, but the sites before it; the hooks
are therefore placed on the projection and the MLP themselves.

`head_patching` and `head_scaling` sweep over all heads in a few batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..architectures.layout import layout
from ..architectures.location import Location, ModelFingerprint, check_layers, check_positions, check_site
from ..interventions import ActivScalar, Intervention
from ..patching.edits import Steering, steerings
from ..patching.forward_call import Call
from ..patching.forward_context import ActivePatch, Context
from ..patching.forward_hooks import join, leave
from ._head_sweeps import check_model, head_patching, head_scaling
from ._library import require
from ._named_modules import refuse_named_module

require("transformer-lens")

__all__ = ["for_transformer_lens", "head_patching", "head_scaling", "hooks"]

Hook = tuple[str, Callable[..., Tensor]]


def hooks(
    model: Any, intervention: Intervention, strength: float | Tensor = 1.0, group: Tensor | None = None
) -> list[Hook]:
    """An intervention as (name, function) pairs for `run_with_hooks(fwd_hooks=...)` or `with model.hooks(...)`.

    Positions mean the same as in `af.patch`: tokens of the prompt, without the padding in the attention mask. In
    `generate()` with its KV cache (the default) later passes hold generated tokens; without the cache every pass looks
    like a prompt, so positions are counted from its start. Under gradient checkpointing, recomputation raises an error.
    While hooks with positions exist, the model records the arguments of its passes; delete the list to undo that.

    Args:
        model: a TransformerBridge, over a Hugging Face model or TransformerLens' own.
        intervention: made for the Hugging Face model inside, for another of its shape, or by `for_transformer_lens`.
        strength: β, a float or one value per row [B].
        group: int64 [B], for a stacked intervention.

    Raises:
        TypeError: not a TransformerBridge, or an intervention that needs a source.
        ValueError: another model, values that are not finite, a module that a path names (`mlp=`, `projection=`) and
            that is not the family's own, or a site whose activations were changed by TransformerLens' weight processing
            (folded value biases, centred output weights).

    Example:
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=hooks(model, intervention, strength=-1.0))
    """
    check_model(model)
    device = torch.device(model.cfg.device)
    found: list[Hook] = []
    for steering in steerings(intervention, device, strength, group):
        location = steering.intervention.location
        location.model.require(_fingerprint(model, location.site))
        refuse_named_module("intervention", location, "TransformerLens")
        if location.positions is not None:
            _note_passes(model, steering)
        for layer, edit in steering.edits():
            found.append((_name(model, location.site, layer), _hook(edit, location.site == "head")))
    return found


def for_transformer_lens(
    model: Any,
    kind: type[Intervention] = ActivScalar,
    site: str = "head",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
    generated: bool = False,
) -> Intervention:
    """A new intervention for a TransformerBridge as it is, with processed weights or not.

    Args:
        model: a TransformerBridge.
        kind: the class, such as `ActivScalar` or `SteerVec`.
        site, layers, positions, generated: as `Intervention.for_model` takes them.
    """
    check_model(model)
    fingerprint = _fingerprint(model, check_site(site))
    chosen, where = check_layers(layers, fingerprint.n_layers), check_positions(positions, generated)
    return kind(Location(site, chosen, where, generated, fingerprint), device=torch.device(model.cfg.device))


def _hook(edit: Callable[[Tensor], Tensor], heads: bool) -> Callable[..., Tensor]:
    if heads:
        return lambda x, hook: edit(x.flatten(2)).view_as(x)
    return lambda x, hook: edit(x)


def _name(model: Any, site: str, layer: int) -> str:
    """The hook point of a site."""
    block = f"blocks.{layer}"
    names = {"head": "attn.hook_z", "attn_out": "attn.o.hook_out", "residual": "hook_resid_post"}
    if site != "mlp_out":
        return f"{block}.{names[site]}"
    point = model.hook_dict.get(f"{block}.hook_mlp_out")
    # In OPT, BLOOM and MPT the MLP is its last projection, or adds the residual stream itself.
    inner = f"{block}.mlp.out.hook_out"
    return inner if point is not None and point.name == inner else f"{block}.mlp.hook_out"


def _fingerprint(model: Any, site: str) -> ModelFingerprint:
    """The model's fingerprint; its type says if weight processing changed the activations of this site."""
    config, cfg = getattr(model.original_model, "config", None), model.cfg
    text_config = getattr(config, "get_text_config", None)
    model_type = str(cfg.architecture) if text_config is None else text_config().model_type
    if model._weights_processed:
        # Centring removes the mean from what is written to the stream; it is not possible with RMS norms.
        value = getattr(model.blocks[0].attn, "v", None)
        folded = getattr(value, "bias", None) is not None if site == "head" else not cfg.uses_rms_norm
        model_type += ", weights processed by TransformerLens" * folded
    return ModelFingerprint(model_type, cfg.n_layers, cfg.n_heads, cfg.d_head, cfg.d_model)


class _Noted(ActivePatch):
    """Hands the arguments of a model's passes to a `Steering`, as long as that lives."""

    reads_arguments = reads_positions = True  # type: ignore[assignment]

    def __init__(self, steering: Steering) -> None:
        self.steering = weakref.ref(steering)

    @property  # type: ignore[override]
    def context(self) -> Context | None:
        steering = self.steering()
        return None if steering is None else steering.context

    @context.setter
    def context(self, value: Context | None) -> None:
        steering = self.steering()
        if steering is not None:
            steering.context = value

    def context_of(self, call: Call) -> Context | None:
        steering = self.steering()
        return None if steering is None else steering.context_of(call)


def _note_passes(model: Any, steering: Steering) -> None:
    try:
        decoder = layout(model.original_model).decoder
    except TypeError:
        raise ValueError("positions: this bridge's model is not of Hugging Face, so its passes are unknown") from None
    noted, reference = _Noted(steering), weakref.ref(decoder)
    join(decoder, decoder, noted)

    def part() -> None:
        found = reference()
        if found is not None:
            leave(found, found, noted)

    weakref.finalize(steering, part)
