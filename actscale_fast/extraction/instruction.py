"""Instruction vectors: the effect of an instruction on the last token of a prompt (arXiv 2410.12877)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .._checks import check_counts, check_finite
from .._suggestions import did_you_mean
from .._tables import Readable, ranges
from ..architectures.layout import layout
from ..architectures.location import Location, check_layers
from ..frozen.encoder import TextEncoder, by_length, check_texts
from ..frozen.perplexity import perplexity
from ..frozen.reader import Reader
from ..interventions import Intervention, Projection, SteerVec
from ..patching.patch import patch
from .continuations import continuations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mode = Literal["projection", "add"]


@dataclass(frozen=True, slots=True)
class LayerScore:
    """The result of one candidate layer on the validation prompts."""

    layer: int
    score: float  # mean over the prompts
    perplexity: float  # median over the continuations, under the model without the vector
    kept: bool  # whether the perplexity is at most `max_perplexity`
    continuations: list[str]


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The layer with the highest mean score among those kept; the lowest such layer."""

    layer: int
    intervention: Intervention
    table: list[LayerScore]


@dataclass(frozen=True, eq=False, repr=False)
class InstructionVectors(Readable):
    """v = mean(h_with − h_without) at the last prompt token, at each layer; u = v/‖v‖; t = mean ⟨h_with, u⟩."""

    location: Location  # site "residual", the layers, every token
    vectors: Tensor  # v, fp32 [L, d], on the CPU
    targets: Tensor  # t, fp32 [L]

    @property
    def directions(self) -> Tensor:
        """u, float32 [L, d]; 0 where the instruction has no effect."""
        return torch.nn.functional.normalize(self.vectors, dim=-1)

    @property
    def norms(self) -> Tensor:
        """‖v‖, float32 [L]; used as coefficients of `add`, they add v itself."""
        return self.vectors.norm(dim=-1)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: the norm of each layer's vector, and the target of its projection."""
        values = zip(self.location.layers, self.norms.tolist(), self.targets.tolist(), strict=True)
        return ["layer", "‖v‖", "t"], [[str(layer), f"{norm:.3g}", f"{target:+.3g}"] for layer, norm, target in values]

    def _heading(self) -> str:
        where = self.location
        return f"Instruction vectors of {where.model.model_type}, layers {ranges(where.layers)}"

    def add(self, layer: int, coefficient: float) -> SteerVec:
        """h + c·u at every token of the prompt and every generated one.

        Raises:
            ValueError: a layer without a vector, or a coefficient that is not finite.
        """
        check_finite(coefficient=coefficient)
        index, location = self._at(layer)
        vector = SteerVec(location)
        with torch.no_grad():
            vector.vectors.copy_(coefficient * self.directions[index])
        return vector

    def projection(self, layer: int) -> Projection:
        """h + (t − ⟨h, u⟩)·u at every token, which sets the component along u to its mean under the instruction.

        Raises:
            ValueError: a layer without a vector.
        """
        index, location = self._at(layer)
        projection = Projection(location)
        with torch.no_grad():
            projection.directions.copy_(self.directions[index])
            projection.targets.copy_(self.targets[index])
        return projection

    def choose_layer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        score: Callable[[str], float],
        *,
        mode: Mode = "projection",
        coefficient: float = 1.0,
        layers: Iterable[int] | None = None,
        max_new_tokens: int = 32,
        max_perplexity: float | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> LayerChoice:
        """The layer whose intervention gives the best-scoring greedy continuations, as chosen in the paper.

        Args:
            model, tokenizer: those that the vectors were made with.
            prompts: validation prompts, without the instruction.
            score: how well a continuation follows the instruction, such as 1.0 or 0.0; higher is better.
            mode: "projection" or "add".
            coefficient: the strength β of the projection, or c of `add`.
            layers: candidates; None: every layer with a vector.
            max_new_tokens: tokens generated for each prompt.
            max_perplexity: drop layers whose continuations have a higher median perplexity, after their prompts and
                under the model without the vector; None: keep all. The paper uses GPT-2 for this and gives no limit.
                An empty continuation has infinite perplexity.
            batch_size: prompts per forward pass.
            progress: show a progress bar.

        Raises:
            TypeError, ValueError: invalid arguments, a score that is not finite, or no layer within `max_perplexity`.
        """
        from tqdm.auto import tqdm

        check_finite(coefficient=coefficient)
        check_texts(prompts, "prompts")
        check_counts(max_new_tokens=max_new_tokens)
        if mode not in ("projection", "add"):
            raise ValueError(
                f"mode: got {mode!r}, expected 'projection' or 'add'{did_you_mean(mode, ('projection', 'add'))}"
            )
        if max_perplexity is not None and not max_perplexity >= 1:
            raise ValueError(f"max_perplexity: got {max_perplexity!r}, expected at least 1")
        own = self.location.layers
        candidates = own if layers is None else check_layers(layers, self.location.model.n_layers)
        edits = [self._edit(layer, mode, coefficient) for layer in candidates]
        table = []
        bar = tqdm(edits, desc="layers", disable=not progress, unit="layer", dynamic_ncols=True)
        for layer, edit in zip(candidates, bar, strict=True):
            with patch(model, edit):
                texts = continuations(
                    model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                    paths=self.location.paths,
                )  # fmt: skip
            scores = [float(score(text)) for text in texts]
            if not all(map(math.isfinite, scores)):
                raise ValueError(f"score: got {scores} at layer {layer}, expected finite numbers")
            fluency = _median_perplexity(model, tokenizer, prompts, texts, batch_size, self.location.paths)
            kept = max_perplexity is None or fluency <= max_perplexity
            table.append(LayerScore(layer, math.fsum(scores) / len(scores), fluency, kept, texts))
        kept_rows = [row for row in table if row.kept]
        if not kept_rows:
            lowest = min(row.perplexity for row in table)
            raise ValueError(f"max_perplexity: got {max_perplexity}, but the lowest of any layer is {lowest:.1f}")
        best = min(kept_rows, key=lambda row: (-row.score, row.layer))
        return LayerChoice(best.layer, self._edit(best.layer, mode, coefficient), table)

    def _edit(self, layer: int, mode: Mode, coefficient: float) -> Intervention:
        if mode == "add":
            return self.add(layer, coefficient)
        projection = self.projection(layer)
        return projection if coefficient == 1.0 else coefficient * projection

    def _at(self, layer: int) -> tuple[int, Location]:
        where = self.location
        number = check_layers([layer], where.model.n_layers)[0]
        if number not in where.layers:
            raise ValueError(f"layer: got {layer}, expected one of {list(where.layers)}, which have a vector")
        location = Location(where.site, (number,), None, False, where.model, where.paths, origin=where.origin)
        return where.layers.index(number), location


def instruction_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    with_instruction: Sequence[str],
    without_instruction: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    batch_size: int = 32,
    progress: bool = True,
    paths: dict[str, str] | None = None,
) -> InstructionVectors:
    """The vectors of an instruction, from pairs of prompts with and without it (arXiv 2410.12877).

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        with_instruction, without_instruction: N prompts each, in pairs; for a chat model after its chat template, up to
            the beginning of the answer.
        layers: layers whose output is read, negative from the end; None: all.
        batch_size: prompts per forward pass.
        progress: show a progress bar.
        paths: module paths for a model whose structure is not recognised.

    Raises:
        TypeError, ValueError: invalid arguments, lists of different lengths, or a prompt without tokens or longer than
            the context.

    Example:
        >>> vectors = instruction_vectors(model, tokenizer, [q + " Answer in capitals." for q in questions], questions)
        >>> with patch(model, vectors.projection(layer=15)):
        ...     model.generate(**inputs)
    """
    from tqdm.auto import tqdm

    check_counts(batch_size=batch_size)
    found = layout(model, paths)
    encoder = TextEncoder(found, tokenizer)
    rows = encoder.prompts(with_instruction, "with_instruction")
    others = encoder.prompts(without_instruction, "without_instruction")
    if len(rows) != len(others):
        raise ValueError(
            f"without_instruction: got {len(others)} prompts, expected one for each of the {len(rows)} with_instruction"
        )
    chosen = check_layers(layers, found.n_layers)
    everything = rows + others
    states = torch.zeros(len(everything), len(chosen), found.hidden_size, dtype=torch.float64, device="cpu")
    with Reader(model, "residual", chosen, paths) as read, tqdm(
        total=len(everything), desc="instruction", disable=not progress, unit="prompt", dynamic_ncols=True
    ) as bar:  # fmt: skip
        for numbers in by_length(everything, batch_size):
            last = read(encoder.batch([everything[row] for row in numbers]), reduce=lambda x: x[:, -1, 0])  # [L, B, d]
            states[numbers] = last.transpose(0, 1).double().cpu()
            bar.update(len(numbers))
    with_states, without = states.split(len(rows))
    vectors = (with_states - without).mean(0)  # [L, d]
    directions = torch.nn.functional.normalize(vectors, dim=-1)
    targets = (with_states * directions).sum(-1).mean(0)  # [L]
    location = found.location("residual", chosen, paths=paths)
    return InstructionVectors(location, vectors.float(), targets.float())


def _median_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: list[str],
    batch_size: int,
    paths: dict[str, str],
) -> float:
    said = [row for row, text in enumerate(texts) if tokenizer(text, add_special_tokens=False)["input_ids"]]
    values = torch.full((len(texts),), math.inf, dtype=torch.float32, device="cpu")
    if said:
        values[said] = perplexity(
            model, tokenizer, [texts[row] for row in said], [prompts[row] for row in said], batch_size=batch_size,
            paths=paths,
        )  # fmt: skip
    return float(values.median())
