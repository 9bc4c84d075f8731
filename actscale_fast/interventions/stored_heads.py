"""Heads that also read a stored run: added to themselves (RunTwice), or exchanged (HeadInterchange).

    RunTwice          y = h + β·α·s          s: the same head's activation in a first run on the same prompt
    HeadInterchange   y = h + β·m·(s − h)    s: the same head's activation in a run on another prompt, the source

Each head has one number that all listed positions share. A token is paired with the token of the stored run at the same
listed position; tokens at no listed position stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_counts
from ..architectures.location import Location
from .placement import Placement
from .takes_source import TakesSource, check_source_positions


class StoredHeads(TakesSource, abstract=True):
    """The base class: one number per layer and head, fp32 [L, 1, H], times what `_change` returns."""

    shares_positions: ClassVar[bool] = True
    #: The name of the parameter.
    amount: ClassVar[str]

    def __init__(self, location: Location, *, n_groups: int | None = None, device: torch.device | None = None) -> None:
        if location.site != "head":
            raise ValueError(f"site: got {location.site!r}, but a {type(self).__name__} acts at the site 'head'")
        if location.heads:
            raise ValueError(
                f"layers: a {type(self).__name__} needs layers whose heads have one number and width, but those of "
                f"layer {min(location.heads)} differ"
            )
        super().__init__(location, n_groups=n_groups, device=device)

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {cls.amount: (location.n_heads,)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        if self.paused:
            return x
        assert placement.index is not None  # there is a list of positions, and no slot for generated tokens
        index = placement.index.expand(x.shape[0], -1)  # [B, T]
        slots = self.location.n_slots + 1
        amounts = self.of_layer(self.get_parameter(self.amount), layer, x.device)[:, 0]  # [G, H]
        if self.n_groups is not None:
            amounts = amounts[index[:, 0] // slots]
        source = self.source_of(layer, x)  # [B, P, H, D]
        slot = (index % slots)[:, :, None, None].expand(-1, -1, *source.shape[2:])
        stored = F.pad(source, (0, 0, 0, 0, 0, 1)).gather(1, slot)  # [B, T, H, D]; 0 where a token has no slot
        beta = strength.to(source.dtype).view(-1, 1, 1, 1) if isinstance(strength, Tensor) else strength
        base = x.to(source.dtype)
        y = (base + beta * amounts.to(source.dtype)[:, None, :, None] * self._change(base, stored)).to(x.dtype)
        return torch.where(slot < self.location.n_slots, y, x)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the heads with the largest numbers."""
        values = self.get_parameter(self.amount).detach().cpu()
        values = values if self.n_groups is not None else values[None]  # [G, L, 1, H]
        n_layers, n_heads = len(self.location.layers), self.location.n_heads
        rows = []
        for flat in values.abs().flatten().argsort(descending=True, stable=True)[:10].tolist():
            value = float(values.flatten()[flat])
            if value:
                group, rest = divmod(flat, n_layers * n_heads)
                layer, head = divmod(rest, n_heads)
                place = [str(group)] if self.n_groups is not None else []
                rows.append([*place, str(self.location.layers[layer]), str(head), f"{value:+.3f}"])
        return [*(["group"] if self.n_groups is not None else []), "layer", "head", self.amount], rows

    def _change(self, base: Tensor, stored: Tensor) -> Tensor:
        """What an amount of 1 adds to each head."""
        raise NotImplementedError


class RunTwice(StoredHeads):
    """Adds to each head its own activation from a first, unsteered run on the same prompt: h + β·α·s.

    This is the second run of JuICE (arXiv 2503.10996). Scaling a head, h·(1 + β·α), amplifies what the heads below have
    already changed; the stored activation has not been changed by any. `alpha` is fp32 [L, 1, H].

    The paper's code repeats both runs for each generated token. Here only the prompt's tokens are edited (our reading),
    and generated ones see the edit through the KV cache.

    Example:
        >>> twice = RunTwice.for_prompts(model, 64, layers=[12])
        >>> twice.alpha[0, 0, 3] = 2.0
        >>> first_run = af.source_activations(model, tokenizer, twice, prompts)
        >>> with twice.interchange(first_run), af.patch(model, twice):
        ...     model.generate(**tokenizer(prompts, return_tensors="pt", padding=True))
    """

    called: ClassVar[str] = "twice"
    amount: ClassVar[str] = "alpha"
    source_is_prompt: ClassVar[bool] = True
    alpha: nn.Parameter

    @classmethod
    def for_prompts(
        cls,
        model: nn.Module,
        longest: int,
        layers: Iterable[int] | None = None,
        *,
        projection: str | None = None,
        layers_path: str | None = None,
    ) -> Self:
        """An intervention at every token of prompts with at most this many tokens; it does nothing yet.

        Args:
            model, layers, projection, layers_path: as in `Intervention.for_model`.
            longest: the most tokens of a prompt; a longer one is refused when its first run is stored.

        Raises:
            TypeError, ValueError: as in `Intervention.for_model`, and a length that is not a positive integer.
        """
        check_counts(longest=longest)
        positions = range(-longest, 0)
        return cls.for_model(model, "head", layers, positions, projection=projection, layers_path=layers_path)

    def _change(self, base: Tensor, stored: Tensor) -> Tensor:
        return stored


class HeadInterchange(StoredHeads):
    """Exchanges each head's activation, by a share, with that of another prompt: (1 − m)·h + m·h_source at β = 1.

    One gate per layer and head, as in the node masks of arXiv 2407.03779 and 2512.10903. `gates` is fp32 [L, 1, H]; 0
    keeps a head, 1 takes that of the source. Where an ablation asks what is lost without a head, an interchange asks
    what it carries: a head whose absence other heads make up for is found too.

    Prompt and source are paired position by position, so `positions=[-1]` suits prompts of any length, and
    `range(-T, 0)` prompts of T aligned tokens.

    Example:
        >>> exchange = HeadInterchange.for_model(model, positions=[-1])
        >>> exchange.gates[12, 0, 3] = 1.0
        >>> source = af.source_activations(model, tokenizer, exchange, ["The capital of Italy is"])
        >>> with exchange.interchange(source), af.patch(model, exchange):
        ...     model(**tokenizer("The capital of France is", return_tensors="pt"))
    """

    called: ClassVar[str] = "exchange"
    amount: ClassVar[str] = "gates"
    gates: nn.Parameter

    @classmethod
    def for_model(
        cls, model: nn.Module, site: str = "head", layers: Iterable[int] | None = None,
        positions: Iterable[int] | None = None, generated: bool = False, *, projection: str | None = None,
        layers_path: str | None = None, mlp: str | None = None,
    ) -> Self:  # fmt: skip
        """Gates of 0, on the model's device; see `Intervention.for_model`.

        Raises:
            TypeError, ValueError: as in `Intervention.for_model`, and positions=None or generated=True.
        """
        positions = None if positions is None else list(positions)
        check_source_positions(positions, generated)
        return super().for_model(
            model, site, layers, positions, generated, projection=projection, layers_path=layers_path, mlp=mlp
        )

    def _change(self, base: Tensor, stored: Tensor) -> Tensor:
        return stored - base
