"""nnsight: an intervention inside a trace.

>>> with model.trace("The capital of France is"):
...     steer(model, intervention, strength=-1.0)
...     logits = model.output.logits.save()

A block of a trace must access values in the order of the forward pass. `steer` accesses every site of the
intervention, so call it first in its block; read values below its last site in a block of their own, an empty
`with tracer.invoke():`, which sees the edits. There is no speed-up: nnsight's access to each site costs more than the
edit (benchmarks/cases/nnsight.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import site_check
from ..architectures.arguments import argument_names
from ..architectures.hugging_face import execution_device
from ..architectures.layout import ModelLayout, layout
from ..architectures.location import SITES
from ..interventions import Intervention
from ..patching.edits import Steering, steerings
from ..patching.forward_call import Prompt, read_call
from ._library import require

require("nnsight")

_Place = tuple[int, int, nn.Module, Callable[[Tensor], Tensor]]  # layer, number of the site, its module, edit


def steer(
    model: Any,
    intervention: Intervention,
    strength: float | Tensor = 1.0,
    *,
    group: Tensor | None = None,
    steps: Iterable[int] | None = None,
) -> None:
    """Edit the activations of the pass that the surrounding trace runs.

    Inside `with tracer.invoke(...):` only that invoke's rows are edited. In `.generate(...)` only the first pass (the
    prompt) is edited unless `steps` is given; positions count the tokens of the prompt.

    Args:
        model: the nnsight model (`TransformersModel`, `LanguageModel` or `NNsight` of a Hugging Face model).
        intervention: made for the wrapped model or another of its type and shape; its parameters get gradients.
        strength: β, a float or one value per row of the invoke [B].
        group: int64 [B], for a stacked intervention.
        steps: passes of a generation, from the first one on: `tracer.iter[:]` for all. Code after this call in the
            block is then not run, because nnsight ends an open loop with the generation.

    Raises:
        TypeError: not an nnsight model, an intervention that needs a source, or steps of another kind.
        ValueError: another model, an invalid strength or group, or a batch whose padding cannot be determined.
        OutOfOrderError: by nnsight, where parts name several modules of one site (`mlp=`) in another order than that in
            which the model runs them; add them in that order.
    """
    from nnsight.intervention.envoy import Envoy

    if not isinstance(model, Envoy):
        raise TypeError(f"model: got {type(model).__name__}, expected an nnsight model")
    found = layout(model._module, intervention.paths if isinstance(intervention, Intervention) else None)
    device = execution_device(found.layers[0]) or torch.device("cpu")
    parts = steerings(intervention, device, strength, group)
    for part in parts:
        location = part.intervention.location
        location.model.require(found.fingerprint)
        site_check.require_site(layout(model._module, location.paths), location.site, location.layers)
    if isinstance(steps, Sequence):
        raise TypeError(f"steps: got a {type(steps).__name__}, expected nnsight's own tracer.iter[...]")
    if steps is None:
        _one_pass(model, found, parts, None)
        return
    prompt = None
    for _ in steps:
        prompt = _one_pass(model, found, parts, prompt)


def _one_pass(model: Any, found: ModelLayout, parts: list[Steering], prompt: Prompt | None) -> Prompt | None:
    """Assign the edited values of one forward pass, site by site; return the generation's prompt."""
    noted = [part for part in parts if part.reads_arguments]
    if noted:
        args, kwargs = _envoy(model, found.decoder).inputs
        call = replace(read_call(argument_names(type(found.decoder)), args, kwargs), prompt=prompt)
        if any(part.reads_positions for part in noted):
            call.refuse_unknown_arguments()
        for part in noted:
            part.context = part.context_of(call)
        if prompt is None:  # the first pass; without a KV cache later ones contain it again
            flat = isinstance(call.mask, Tensor) and call.mask.dim() == 2
            prompt = Prompt(call.n_tokens, call.mask != 0 if flat else None)
    places: list[_Place] = []
    for part in parts:
        location = part.intervention.location
        site, own = SITES.index(location.site), layout(model._module, location.paths)
        places += [(layer, site, own.site_module(location.site, layer), edit) for layer, edit in part.edits()]
    for _, site, module, edit in sorted(places, key=lambda place: place[:2]):
        envoy = _envoy(model, module)
        if SITES[site] == "head":
            envoy.input = edit(envoy.input)
            continue
        output = envoy.output
        envoy.output = (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)
    return prompt


def _envoy(model: Any, module: nn.Module) -> Any:
    return model.interleaver.envoys[id(module)]
