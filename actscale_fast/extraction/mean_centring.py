"""Mean-centring: the mean activation of target texts, less that of a training sample (arXiv 2312.03813)."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_counts, check_finite
from ..architectures.layout import layout
from ..architectures.location import Location, check_layers, check_site
from ..frozen.encoder import TextEncoder
from ..frozen.reader import Reader
from ..interventions import SteerVec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens in one forward pass at most, padding included (one text at least): 38 MB of a stream of 576 in float32.
_TOKENS = 16384
#: Texts that are sorted by length together, in batches: little is padded, and an iterator is not held whole.
_SORTED = 16


@dataclass(frozen=True, eq=False)
class Means:
    """Sums of activations over tokens, [L, H, D] in float64 on the CPU; `a + b` is of both sets of texts."""

    location: Location  # site, layers and model
    sums: Tensor
    n_tokens: int
    n_texts: int  # with at least one token that counts
    n_cut: int  # longer than `max_tokens` or the context
    n_empty: int  # without tokens to count
    skip: int = 0  # tokens at the start of each text that were left out

    @property
    def mean(self) -> Tensor:
        """float64 [L, H, D]."""
        return self.sums / self.n_tokens

    def of_layers(self, layers: Iterable[int]) -> Tensor:
        """The mean at some of the layers, float64 [L, H, D]. Raises ValueError where one was not read."""
        chosen = check_layers(layers, self.location.model.n_layers)
        missing = [layer for layer in chosen if layer not in self.location.layers]
        if missing:
            raise ValueError(f"layers: got {missing}, expected some of those read, {list(self.location.layers)}")
        return self.mean[[self.location.layers.index(layer) for layer in chosen]]

    def __add__(self, other: Means) -> Means:
        if not isinstance(other, Means):
            return NotImplemented
        if (self.location, self.skip) != (other.location, other.skip):
            raise ValueError("means: their sites, layers, models or `skip` differ, expected the same")
        return Means(
            self.location,
            self.sums + other.sums,
            n_tokens=self.n_tokens + other.n_tokens,
            n_texts=self.n_texts + other.n_texts,
            n_cut=self.n_cut + other.n_cut,
            n_empty=self.n_empty + other.n_empty,
            skip=self.skip,
        )


def mean_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    site: str = "residual",
    layers: Iterable[int] | None = None,
    skip: int = 0,
    batch_size: int = 32,
    max_tokens: int | None = None,
    progress: bool = True,
    paths: dict[str, str] | None = None,
) -> Means:
    """The mean activation over all tokens of all texts, those that open a text included; padding does not count.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        texts: any number, also an iterator, of which only some batches are held at a time.
        site: "residual" (the decoder layer's output), "head", "attn_out" or "mlp_out".
        layers: numbers of the layers, negative from the end; None: all.
        skip: tokens at the start of each text that are left out of the mean; 0 is the paper's. In many models the first
            token has a norm a hundred times that of the others, and the mean follows its share, that is the length of
            the texts: in SmolLM2-135M from layer 11 on, where skip=1 is needed.
        batch_size: texts in one forward pass; fewer where they are long.
        max_tokens: what a text is cut to; None: the model's context, with one warning where that cuts any.
        progress: show a progress bar.
        paths: module paths of a model of an unlisted family.

    Raises:
        TypeError, ValueError: a string in place of texts, one that is none, or no token at all.
    """
    from tqdm.auto import tqdm

    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: got {type(texts).__name__}, expected an iterable of strings")
    check_counts(batch_size=batch_size)
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise ValueError(f"skip: got {skip!r}, expected an integer >= 0")
    if max_tokens is not None:
        check_counts(max_tokens=max_tokens)
    found = layout(model, paths)
    encoder = TextEncoder(found, tokenizer)
    limit = min((n for n in (max_tokens, encoder.context) if n is not None), default=None)
    location = found.location(check_site(site), layers, paths=paths)
    chosen = location.layers
    n_texts = n_tokens = n_cut = n_empty = 0
    sums = torch.zeros(len(chosen), location.n_heads, location.width, dtype=torch.float64, device="cpu")
    total = len(texts) if isinstance(texts, Sequence) else None
    with Reader(model, site, chosen, paths) as read, tqdm(
        total=total, desc="means", disable=not progress, unit="text", dynamic_ncols=True
    ) as bar:  # fmt: skip
        numbered = enumerate(texts)
        while window := list(itertools.islice(numbered, _SORTED * batch_size)):
            rows = [encoder.opened(text, f"texts: row {row}") for row, text in window]
            cut = [ids[:limit] for ids in rows]
            n_cut += sum(len(one) < len(ids) for one, ids in zip(cut, rows, strict=True))
            kept = [ids for ids in cut if len(ids) > skip]
            n_empty += len(rows) - len(kept)
            bar.update(len(rows) - len(kept))
            for batch_rows in _batches(kept, batch_size):
                batch = encoder.batch(batch_rows)
                real = (batch.attention_mask.cumsum(-1) > skip)[:, :, None, None]
                # In float64 layer by layer; what stands at padding may be anything, NaN too.
                sums += read(batch, reduce=functools.partial(_sum, real)).cpu()
                n_texts, n_tokens = n_texts + len(batch_rows), n_tokens + sum(len(ids) - skip for ids in batch_rows)
                bar.update(len(batch_rows))
    if not n_tokens:
        raise ValueError("texts: got none with a token, expected at least one")
    if n_cut and max_tokens is None:
        warnings.warn(f"texts: {n_cut} of {n_texts} were cut to the model's context of {limit} tokens", stacklevel=2)
    return Means(location, sums, n_tokens, n_texts, n_cut, n_empty, skip)


def mean_centring(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Iterable[str] | Means,
    training: Iterable[str] | Means,
    *,
    layers: Iterable[int],
    site: str = "residual",
    coefficient: float = 1.0,
    positions: Iterable[int] | None = (-1,),
    generated: bool = True,
    skip: int = 0,
    batch_size: int = 32,
    max_tokens: int | None = None,
    progress: bool = True,
    paths: dict[str, str] | None = None,
) -> SteerVec:
    """Steering vectors towards what target texts have in common: c·(mean target − mean training) (arXiv 2312.03813).

    The training texts stand for all that the model may say; without their mean the vector would carry the bias that all
    activations share. The paper adds the vector of one layer at the last token, which while generating is each new one:
    hence the positions. Its coefficients range from 3 (Llama 2) to 60 (GPT-2).

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        target, training: texts, or their `mean_activations` to use again: a training sample serves many targets.
        layers: numbers of the layers, negative from the end; the paper steers one.
        site: as `mean_activations` takes it.
        coefficient: c.
        positions, generated: where the vector is added; positions=None: to every token, whatever `generated` says.
        skip, batch_size, max_tokens, progress, paths: as `mean_activations` takes them, for texts.

    Raises:
        TypeError, ValueError: see `mean_activations`; means of another site, model or without those layers.

    Example:
        >>> everything = mean_activations(model, tokenizer, training_texts)
        >>> sea = mean_centring(model, tokenizer, sea_stories, everything, layers=[10], coefficient=2)
    """
    check_finite(coefficient=coefficient)
    vector = SteerVec.for_model(model, site, layers, positions, generated and positions is not None, **(paths or {}))
    chosen = vector.location.layers
    means = []
    for name, texts in (("target", target), ("training", training)):
        if not isinstance(texts, Means):
            texts = mean_activations(
                model, tokenizer, texts, site=site, layers=chosen, batch_size=batch_size, max_tokens=max_tokens,
                skip=skip, progress=progress, paths=paths,
            )  # fmt: skip
        vector.location.model.require(texts.location.model)
        if texts.location.site != site:
            raise ValueError(f"{name}: got means of site {texts.location.site!r}, expected {site!r}")
        means.append(texts)
    if means[0].skip != means[1].skip:
        raise ValueError(f"training: got means with skip={means[1].skip}, expected {means[0].skip} as the target's")
    with torch.no_grad():
        difference = coefficient * (means[0].of_layers(chosen) - means[1].of_layers(chosen))
        vector.vectors.copy_(difference[:, None].expand(vector.vectors.shape))
    return vector


def _sum(real: Tensor, x: Tensor) -> Tensor:
    """x [B, T, H, D] over the real tokens, float64 [H, D]."""
    return torch.where(real.to(x.device), x, 0).sum((0, 1), dtype=torch.float64)


def _batches(rows: list[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """Rows of similar length, at most `batch_size` of them and `_TOKENS` tokens."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(row) > _TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
