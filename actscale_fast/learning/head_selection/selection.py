"""The heads that a method chose: their scores, the intervention that scales them, and how they are kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from ..._checks import check_counts, check_finite
from ..._json import read_sealed, write_sealed
from ..._tables import Readable
from ...architectures.location import Location
from ...architectures.model_origin import ModelOrigin
from ...interventions import ActivScalar, HeadInterchange, Intervention, RunTwice
from ...tasks.loading import ExampleSource
from .methods import METHODS
from .strength import Direction, check_choice, chosen_strength, strengths_measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLASSES: dict[str, type[ActivScalar | RunTwice | HeadInterchange]] = {
    "scale": ActivScalar, "run-twice": RunTwice, "interchange": HeadInterchange,
}  # fmt: skip
_FORMAT = 1
_TENSORS = ("scores", "values", "chosen")


class ScoredHead(NamedTuple):
    """One chosen head."""

    layer: int  # number of the layer in the model
    head: int
    score: float
    alpha: float  # at the selection's strength


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadSelection(Readable):
    """The result of `select_heads`. L scored layers, H heads; all tensors are on the CPU.

    `intervention()` makes what `patch`, `evaluate` and `save_pretrained` take; `save` and `load` keep the selection
    itself as a JSON file.
    """

    method: str
    scores: Tensor = field(repr=False)  #: fp32 [L, H]: the method's score of every head; the largest are chosen
    values: Tensor = field(repr=False)  #: fp32 [L, H]: α of each head at strength 1, if it is chosen
    chosen: Tensor = field(repr=False)  #: bool [L, H]
    location: Location = field(repr=False)  #: where the intervention acts
    strength: float = 1.0  #: what `values` are multiplied by
    n_examples: int = 0  #: number of examples that the heads were scored on
    #: One record per strength that was tried on validation examples; see `strength.strengths_measured`.
    validation: list[dict[str, float]] = field(default_factory=list, repr=False)
    seconds: float = 0.0  #: duration of scoring and fitting; by `compare_heads` also of the choice of the strength
    details: dict[str, Any] = field(default_factory=dict, repr=False)  #: further findings of the method, by name

    @property
    def k(self) -> int:
        """The number of chosen heads."""
        return int(self.chosen.sum())

    @property
    def heads(self) -> list[ScoredHead]:
        """The chosen heads, the one with the largest score first."""
        flat = self.chosen.flatten().nonzero().flatten()
        order = flat[self.scores.flatten()[flat].argsort(descending=True, stable=True)].tolist()
        n_heads, layers = self.scores.shape[1], self.location.layers
        found = []
        for place in order:
            index, head = divmod(place, n_heads)
            alpha = self.strength * float(self.values[index, head])
            found.append(ScoredHead(layers[index], head, float(self.scores[index, head]), alpha))
        return found

    def intervention(self, strength: float | None = None, *, longest: int | None = None) -> Intervention:
        """The chosen heads as an intervention on the CPU; `patch` moves it to the model.

        Args:
            strength: what α is multiplied by; None: the selection's own.
            longest: for a RunTwice, the most tokens of a prompt; None: those of the longest prompt that
                `select_heads` or `compare_heads` was given, and 64 at least.

        Returns:
            An ActivScalar; for the method "juice" a RunTwice, and for "interchange" a HeadInterchange, which read
            stored activations (see `source_activations`).
        """
        strength = self.strength if strength is None else strength
        check_finite(strength=strength)
        kind, location = METHODS[self.method].kind, self.location
        if longest is not None:
            check_counts(longest=longest)
            if kind != "run-twice":
                raise ValueError(
                    f"longest: is for a RunTwice, but the method {self.method!r} makes another intervention"
                )
            location = replace(location, positions=tuple(range(-longest, 0)))
        made = _CLASSES[kind](location)
        with torch.no_grad():
            (parameter,) = made.parameters()
            parameter.copy_((strength * self.values * self.chosen)[:, None].expand_as(parameter))
        return made

    def at(self, k: int) -> HeadSelection:
        """Another number of heads by the same scores, with this selection's strength.

        Raises:
            ValueError: the method learns its values for one number of heads, or there are fewer heads.

        Warns:
            UserWarning: fewer heads have a value that is not 0.
        """
        if METHODS[self.method].is_fitted:
            raise ValueError(
                f"k: the method {self.method!r} fits its values for one number of heads; call select_heads with k={k}"
            )
        chosen = top(self.scores, self.values, k)
        warn_of_fewer(self.method, chosen, k)
        return replace(self, chosen=chosen, validation=[])

    def choose_strength(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: ExampleSource,
        *,
        strengths: Sequence[float] | None = None,
        max_kl: float | None = None,
        direction: Direction = "both",
        batch_size: int = 32,
        progress: bool = False,
    ) -> HeadSelection:
        """This selection with the strength that flips most of these examples, within a bound on side effects.

        Args:
            model, tokenizer: the model that the heads were chosen on.
            examples: examples that neither chose the heads nor will judge them.
            strengths: strengths to try; None: those of the method.
            max_kl: the largest mean KL divergence of the other tokens that is allowed, in nats, as `evaluate` measures
                it; None: any.
            direction: what counts: flips to the "correct" answer under β = +1, to the "wrong" one under β = −1, or the
                mean of "both". The KL divergence is that of the same direction.
            batch_size: prompts in one pass.
            progress: show a progress bar.

        Raises:
            ValueError: no strength stays within the bound; the message names the one with the smallest divergence.
        """
        if strengths is None:
            strengths = METHODS[self.method].strengths
        check_choice(strengths, max_kl, direction)
        records = strengths_measured(
            model, tokenizer, examples, self.intervention, strengths, batch_size=batch_size, progress=progress
        )
        return replace(self, strength=chosen_strength(records, max_kl, direction), validation=records)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the ten heads with the largest scores."""
        rows = [
            [str(layer), str(head), f"{score:.3g}", f"{alpha:+.3g}"] for layer, head, score, alpha in self.heads[:10]
        ]
        return ["layer", "head", "score", "α"], rows

    def _heading(self) -> str:
        what = METHODS[self.method].what
        return f"{self.k} of {self.scores.numel()} heads by {self.method}: {what} ({self.n_examples} prompts)"

    def _notes(self) -> list[str]:
        notes = [f"and {self.k - 10} more"] if self.k > 10 else []
        note = f"strength {self.strength:g}"
        measured = [record for record in self.validation if record["strength"] == self.strength]
        if measured:
            one = measured[0]
            note += (
                f"; on {one['n_examples']:.0f} validation prompts: correct above wrong {one['flip_to_correct']:.2f} "
                f"(β = +1), wrong above correct {one['flip_to_wrong']:.2f} (β = −1), KL {one['kl']:.3f}"
            )
        return [*notes, note]

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the scores of all heads, the chosen ones outlined; see `plots.head_scores`."""
        from ...plots import head_scores

        title = options.pop("title", f"{self.k} heads by {self.method}")
        return head_scores(self.scores, path, layers=self.location.layers, chosen=self.chosen, title=title, **options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data |= {name: data[name].tolist() for name in _TENSORS} | {"location": self.location.to_dict()}
        origin = self.location.origin
        return {"format": _FORMAT, **data, "model": None if origin is None else origin.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`, for untrusted data.

        Raises:
            ValueError: not such data.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {_FORMAT}")
            location = Location.from_dict(data["location"])
            if data["model"] is not None:
                location = replace(location, origin=ModelOrigin.from_dict(data["model"]))
            found = {item.name: data[item.name] for item in fields(cls)} | {"location": location}
            for name in _TENSORS:
                dtype = torch.bool if name == "chosen" else torch.float32
                found[name] = torch.tensor(data[name], dtype=dtype, device="cpu")
                if found[name].shape != (len(location.layers), location.n_heads):
                    raise ValueError(f"{name}: got shape {tuple(found[name].shape)}, expected one value per head")
            if found["method"] not in METHODS:
                raise ValueError(f"method: got {found['method']!r}")
            for name in ("strength", "seconds"):
                check_finite(**{name: found[name]})
            return cls(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"damaged, or not a selection of heads ({type(error).__name__}: {error})") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to a JSON file, atomically."""
        write_sealed(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was changed, or is something else; the message names the file.
        """
        try:
            return cls.from_dict(read_sealed(Path(path)))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def warn_of_fewer(method: str, chosen: Tensor, k: int) -> None:
    """Warn the caller's caller if fewer than k heads are chosen."""
    if (n_chosen := int(chosen.sum())) < k:
        warnings.warn(
            f"k: got {k}, but the method {method!r} gives a value other than 0 to {n_chosen} of the heads only",
            stacklevel=3,
        )


def top(scores: Tensor, values: Tensor, k: int) -> Tensor:
    """bool [L, H]: the k heads with the largest scores, among those with a value.

    Raises:
        ValueError: there are fewer heads.
    """
    check_counts(k=k)
    if k > scores.numel():
        raise ValueError(f"k: got {k}, expected at most {scores.numel()}, the number of heads")
    flat = torch.where(values != 0, scores, -torch.inf).flatten()
    order = flat.argsort(descending=True, stable=True)[:k]
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device="cpu")
    chosen[order] = flat[order] > -torch.inf
    return chosen.view(scores.shape)
