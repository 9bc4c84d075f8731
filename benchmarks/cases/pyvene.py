"""Interventions in a forward pass: on pyvene's own path, and accelerated by this package.

Of a site of X bytes a layer pyvene clones, gathers, computes and scatters back: 9X for all heads, 8X for an addition,
6X for a whole site, 5.5X for one head of 8. Here it is 2X, and of one head, which is edited where it lies, 0.5X.
`model alone` is the pass without an intervention: the columns less its own are what intervening costs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast import ops

from ..case import Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=256, dtype=torch.float32, kv_heads=2, inner=1024)
HEADS = {"all heads": tuple(range(SHAPE.heads)), "one head": (3,)}


def scaling_class() -> type:
    """What a user writes for pyvene: a product in plain PyTorch, one factor a head or one in all."""
    import pyvene

    class Product(pyvene.SourcelessIntervention, pyvene.TrainableIntervention):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "keep_last_dim": True})
            count = int(kwargs["max_number_of_units"]) if kwargs["unit"] == "h" else 1
            self.alpha = torch.nn.Parameter(torch.zeros(count))

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            factors = 1 + self.alpha.to(base.dtype)
            return base * (factors[:, None, None] if base.dim() == 4 else factors)

    return Product


def configured(model: Any, kind: type, what: str, values: Tensor) -> Any:
    """An IntervenableModel with this on every layer; `values` [L, ...]."""
    import pyvene

    entries: list[dict[str, Any]] = []
    for layer in range(SHAPE.layers):
        entry: dict[str, Any] = {"layer": layer, "component": "block_output", "intervention_type": kind}
        if what in HEADS:
            entry |= {"component": "head_attention_value_output", "unit": "h", "max_number_of_units": len(HEADS[what])}
        if what == "addition":
            entry |= {"intervention_type": pyvene.AdditionIntervention, "source_representation": values[layer]}
        entries.append(entry)
    intervenable = pyvene.IntervenableModel(entries, model)
    intervenable.set_device(model.device)
    if what != "addition":
        with torch.no_grad():
            for value, item in zip(values, intervenable.interventions.values(), strict=True):
                item.alpha.copy_(value)
    return intervenable


def ours(model: Any, what: str, values: Tensor) -> af.Intervention:
    """The same for `af.patch`."""
    made: Any = (af.SteerVec if what == "addition" else af.ActivScalar).for_model(
        model, site="head" if what in HEADS else "residual"
    )
    (parameter,) = made.parameters()
    with torch.no_grad():
        if what in HEADS:
            parameter[:, 0, list(HEADS[what])] = values.to(parameter)
        else:
            parameter.copy_(values.view_as(parameter))
    return made


def make(what: str, tokens: int, dtype: torch.dtype, backward: bool, device: torch.device) -> Problem:
    from actscale_fast.integrations.pyvene import ScaleIntervention, accelerate

    resources = contextlib.ExitStack()
    model, normal = random_model(SHAPE, device).to(dtype), generator()
    if backward:  # pyvene writes over what SDPA keeps for its backward pass
        model.set_attn_implementation("eager")
    width = SHAPE.heads * SHAPE.head_dim if what == "addition" else len(HEADS.get(what, (0,)))
    values = normal(SHAPE.layers, width, scale=0.3).to(device, dtype if what == "addition" else torch.float32)
    ids = torch.randint(SHAPE.vocab, (4, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    some = {"base": [[list(HEADS[what])] * 4] * SHAPE.layers} if what in HEADS else None

    def run(intervenable: Any) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            logits = intervenable(base={"input_ids": ids}, unit_locations=some, use_cache=False)[1].logits
        if not backward:
            return (logits,)
        parameters = [item.alpha for item in intervenable.interventions.values()]
        return (logits.detach(), torch.stack(torch.autograd.grad(logits.float().square().mean(), parameters)))

    def alone() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(ids, use_cache=False).logits,)

    def exact() -> tuple[Tensor, ...]:
        double, intervention = copy.deepcopy(model).double(), ours(model, what, values)
        with ops.use_backend("reference"), torch.set_grad_enabled(backward), af.patch(double, intervention):
            logits = double(ids, use_cache=False).logits
            if not backward:
                return (logits,)
            (gradient,) = torch.autograd.grad(logits.square().mean(), list(intervention.parameters()))
        return logits.detach(), (gradient[:, 0, list(HEADS[what])] if what in HEADS else gradient[:, 0]).double()

    kinds = {"eager": scaling_class(), "eager, ScaleIntervention": ScaleIntervention}
    stock = {name: configured(model, kind, what, values) for name, kind in kinds.items()}
    if what == "addition":
        del stock["eager, ScaleIntervention"]
    fast = configured(model, ScaleIntervention, what, values)
    resources.enter_context(accelerate(fast))
    variants = [Variant(name, functools.partial(run, intervenable)) for name, intervenable in stock.items()]
    variants += [Variant(f"actscale_fast {b}", functools.partial(run, fast), b) for b in kernel_backends(device)]
    if not backward:
        variants.append(Variant("model alone", alone, checked=False))
    share = len(HEADS[what]) / SHAPE.heads if what in HEADS else 1.0
    n_bytes = int(2 * SHAPE.layers * ids.numel() * SHAPE.heads * SHAPE.head_dim * dtype.itemsize * share)
    return Problem(variants, exact, n_bytes, flops=0, dtype=dtype, resources=resources)


def site(what: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """One site alone: its module does nothing but carry pyvene's hook, as `IntervenableModel` sets it."""
    from actscale_fast.integrations.pyvene import ScaleIntervention, accelerate

    resources, normal = contextlib.ExitStack(), generator()
    model, width = random_model(SHAPE, device).to(dtype), SHAPE.heads * SHAPE.head_dim
    if what in HEADS:
        model.model.layers[0].self_attn.o_proj = torch.nn.Identity()
    else:
        model.model.layers[0] = torch.nn.Identity()
    count = width if what == "addition" else len(HEADS.get(what, (0,)))
    values = normal(SHAPE.layers, count, scale=0.3).to(device, dtype if what == "addition" else torch.float32)
    x = normal(4, 256, width).to(device, dtype)
    some = [list(HEADS[what])] * 4 if what in HEADS else None

    def run(intervenable: Any) -> tuple[Tensor, ...]:
        key = next(iter(intervenable.interventions))
        module = intervenable.intervention_hooks[key].__self__
        with torch.no_grad():
            handlers = intervenable._intervention_setter([key], [some], None, None)
            y = module(x.clone())  # pyvene writes over its input
            handlers.remove()
        return (y,)

    def exact() -> tuple[Tensor, ...]:
        wide = x.double().unflatten(-1, (SHAPE.heads, -1)).clone()
        if what == "addition":
            return (x.double() + values[0].double(),)
        heads = list(HEADS.get(what, range(SHAPE.heads)))
        wide[:, :, heads] *= (1 + values[0].double())[:, None]
        return (wide.flatten(2),)

    stock, fast = (configured(model, kind, what, values) for kind in (scaling_class(), ScaleIntervention))
    resources.enter_context(accelerate(fast))
    variants = [Variant("eager", functools.partial(run, stock))]
    variants += [Variant(f"actscale_fast {b}", functools.partial(run, fast), b) for b in kernel_backends(device)]
    variants.append(Variant("clone alone", lambda: (x.clone(),), checked=False))
    return Problem(variants, exact, n_bytes=4 * x.nbytes, flops=0, dtype=dtype, resources=resources)


def case() -> Case:
    note = "The hook of one site, set and called; every variant has a clone of its input, which pyvene writes over."
    settings = [
        Setting(f"{what}, site alone, {str(dtype)[6:]}", functools.partial(site, what, dtype), note=note, quick=True)
        for what in (*HEADS, "whole site", "addition")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    settings += [
        Setting(
            f"{what}, 4 × {tokens} tokens, {str(dtype)[6:]}", functools.partial(make, what, tokens, dtype, False),
            quick=what == "all heads" and tokens == 256 and dtype == torch.float32,
        )
        for what in (*HEADS, "whole site", "addition")
        for tokens, dtype in ((256, torch.float32), (256, torch.bfloat16), (1, torch.float32))
    ]  # fmt: skip
    settings.append(
        Setting(
            "all heads, 4 × 256 tokens, float32, forward + backward",
            functools.partial(make, "all heads", 256, torch.float32, True),
            note="Eager attention: on its own path pyvene has no gradients of heads under SDPA.",
        )
    )
    title = "pyvene: an intervention on each of 4 layers of width 512, one forward pass"
    return Case("pyvene", title, settings, bandwidth=False, counted=True)
