"""The size of an activation, of which `fit(lr="5%")` is a share: measured once on the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import defaults
from ..architectures.hugging_face import unwrap
from ..architectures.location import Location
from ..architectures.sharding import model_processes
from ..frozen.reader import Reader
from ..interventions import Intervention
from .encoded_examples import EncodedExamples, evenly_spaced
from .engine.token_budget import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Prompts in a pass; half as many, down to one, whenever memory runs out.
_BATCH = 16


class ZeroActivationError(ValueError):
    """The activation at a site is 0 in every layer, so that it has no size.

    Args:
        site: where it is.
        lr: the learning rate that is a share of the size.
    """

    def __init__(self, site: str, lr: float | str) -> None:
        self.site = site
        named = f"the default lr={lr!r}" if lr == defaults.LR else f"lr={lr!r}"
        super().__init__(
            f"lr: the activation at site {site!r} is 0 in every layer, so there is no size to take a share of for "
            f"{named}; pass a number"
        )

    def with_lr(self, lr: float | str) -> ZeroActivationError:
        """The same error for another learning rate."""
        return ZeroActivationError(self.site, lr)


def activation_sizes(
    model: PreTrainedModel, data: EncodedExamples, intervention: Intervention, rows: Sequence[int],
    lr: float | str = defaults.LR,
) -> list[Tensor | None]:  # fmt: skip
    """The size of the activation that each part of an intervention edits, in each of its layers.

    The size is the median over tokens of the root mean square over an activation's entries: a mean would be that of the
    first token, whose activations are hundreds of times larger in many models. It is taken over the steered tokens of
    at most 64 prompts that are evenly spaced among the examples, or over all their tokens where none is steered.

    Args:
        model: the frozen model; patches that were applied before stay in effect.
        data: the encoded examples.
        intervention: a single intervention or a composite.
        rows: the fit's examples among `data`.
        lr: the learning rate that is a share of the size, which errors name.

    Returns:
        float32 [L] on the CPU for each part; None where a part's parameters do not depend on the size.

    Raises:
        ZeroActivationError: the activation is 0 in every layer.
        FloatingPointError: it is not finite.
    """
    chosen = evenly_spaced(rows)
    found: dict[tuple[object, ...], Tensor] = {}
    sizes: list[Tensor | None] = []
    for single in intervention.singles:
        place = single.location
        key = (place.module_key, place.layers, place.positions)
        if single.activation_power and key not in found:
            found[key] = _sizes(model, data, place, chosen, lr)
        sizes.append(found[key] if single.activation_power else None)
    return sizes


def _sizes(
    model: PreTrainedModel, data: EncodedExamples, place: Location, rows: Sequence[int], lr: float | str
) -> Tensor:
    of_prompts = _of_prompts(model, data, place, rows)
    steered = []
    for of_tokens in of_prompts:
        length = of_tokens.shape[1]
        steered.append(of_tokens[:, [p % length for p in place.positions or () if -length <= p < length]])
    values = torch.cat(steered, 1)
    if place.positions is None or not values.shape[1]:
        values = torch.cat(of_prompts, 1)
    sizes = values.median(1).values
    bad = [layer for layer, size in zip(place.layers, sizes.tolist(), strict=True) if not 0 <= size < torch.inf]
    if bad:
        raise FloatingPointError(f"lr: the activation at site {place.site!r} of layers {bad} is not finite")
    positive = sizes[sizes > 0]
    if not len(positive):
        raise ZeroActivationError(place.site, lr)
    return torch.where(sizes > 0, sizes, positive.median())  # in a layer of zeros, a step like those of the others


def _of_prompts(model: PreTrainedModel, data: EncodedExamples, place: Location, rows: Sequence[int]) -> list[Tensor]:
    """The root mean square of each token's activation, a float32 [L, T] for each prompt."""
    size = _BATCH
    while True:
        found = []
        try:
            with Reader(model, place.site, place.layers, place.paths, split_heads=False) as read:
                for batch in data.by_length(size, rows):
                    of_tokens = read(data.batch(batch), reduce=_root_mean_square).cpu()  # [L, B, T]
                    found += [of_tokens[:, i, -len(data.prompts[row]) :] for i, row in enumerate(batch)]
            return found
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if size == 1 or not out_of_memory(error) or model_processes(unwrap(model)).size > 1:
                raise
        size //= 2


def _root_mean_square(x: Tensor) -> Tensor:
    """[B, T, H, D] as float32 [B, T]."""
    return x.float().square().mean((-2, -1)).sqrt()
