"""Mean-centring: the mean activation over target texts minus that over a training sample (arXiv 2312.03813)."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_counts, check_finite, check_not_negative
from ..architectures.layout import layout
from ..architectures.location import Location, check_layers, check_site
from ..frozen.encoder import TextEncoder
from ..frozen.reader import Reader
from ..interventions import SteerVec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Maximum number of tokens per forward pass, including padding (but at least one text).
_TOKENS = 16384
#: Number of batches whose texts are sorted by length together, so that little is padded.
_SORTED = 16


@dataclass(frozen=True, eq=False)
class Means:
    """Sums of activations over tokens, [L, H, D] in float64 on the CPU; `a + b` covers the texts of both."""

    location: Location  # site, layers and model
    sums: Tensor
    n_tokens: int
    n_texts: int  # with at least one token that counts
    n_cut: int  # texts longer than `max_tokens` or the context
    n_empty: int  # texts without a token that counts
    skip: int = 0  # tokens at the start of each text that were left out

    @property
    def mean(self) -> Tensor:
        """float64 [L, H, D]."""
        return self.sums / self.n_tokens

    def of_layers(self, layers: Iterable[int]) -> Tensor:
        """The mean at some of the layers, float64 [L, H, D]; a ValueError for a layer that was not read."""
        chosen = check_layers(layers, self.location.model.n_layers)
        missing = [layer for layer in chosen if layer not in self.location.layers]
        if missing:
            raise ValueError(f"layers: got {missing}, expected some of {list(self.location.layers)}, which were read")
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
    """The mean activation over all tokens of all texts, including opening tokens but not padding.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        texts: any number of texts; an iterator is read a few batches at a time.
        site: "residual" (the decoder layer's output), "head", "attn_out" or "mlp_out".
        layers: layer numbers, negative from the end; None: all.
        skip: number of tokens at the start of each text that are left out of the mean; 0 in the paper. In many models
            the first token has a norm a hundred times that of the others, so the mean depends on the length of the
            texts; SmolLM2-135M needs skip=1 from layer 11 on.
        batch_size: texts per forward pass; fewer if they are long.
        max_tokens: cut texts to this length; None: to the model's context, with one warning if any is cut.
        progress: show a progress bar.
        paths: module paths for a model whose structure is not recognised.

    Raises:
        TypeError, ValueError: a string in place of texts, a text that is not a string, or no token at all.
    """
    from tqdm.auto import tqdm

    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: got {type(texts).__name__}, expected an iterable of strings")
    check_counts(batch_size=batch_size)
    check_not_negative(skip=skip)
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
        numbered = enumerate(texts, 1)
        while window := list(itertools.islice(numbered, _SORTED * batch_size)):
            rows = [encoder.opened(text, f"row {row} of texts") for row, text in window]
            cut = [ids[:limit] for ids in rows]
            n_cut += sum(len(one) < len(ids) for one, ids in zip(cut, rows, strict=True))
            kept = [ids for ids in cut if len(ids) > skip]
            n_empty += len(rows) - len(kept)
            bar.update(len(rows) - len(kept))
            for batch_rows in _batches(kept, batch_size):
                batch = encoder.batch(batch_rows)
                real = (batch.attention_mask.cumsum(-1) > skip)[:, :, None, None]
                # In float64, layer by layer; activations at padding may be anything, including NaN.
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
    """Steering vectors c·(mean target − mean training), towards what target texts share (arXiv 2312.03813).

    Subtracting the mean of ordinary training texts removes the bias that all activations share. The paper adds the
    vector of one layer at the last token and at each generated one, which is the default here. Its coefficients range
    from 3 (Llama 2) to 60 (GPT-2).

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        target, training: texts, or their `mean_activations`, which can be used again.
        layers: layer numbers, negative from the end; the paper steers one layer.
        site: as in `mean_activations`.
        coefficient: c.
        positions, generated: where the vector is added; with positions=None to every token.
        skip, batch_size, max_tokens, progress, paths: as in `mean_activations`.

    Raises:
        TypeError, ValueError: as in `mean_activations`; means of another site or model, or without these layers.

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
        raise ValueError(f"training: got means with skip={means[1].skip}, expected {means[0].skip} as for the target")
    with torch.no_grad():
        difference = coefficient * (means[0].of_layers(chosen) - means[1].of_layers(chosen))
        vector.vectors.copy_(difference[:, None].expand(vector.vectors.shape))
    return vector


def _sum(real: Tensor, x: Tensor) -> Tensor:
    """The sum of x [B, T, H, D] over the real tokens, float64 [H, D]."""
    return torch.where(real.to(x.device), x, 0).sum((0, 1), dtype=torch.float64)


def _batches(rows: list[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of rows of similar length, with at most `batch_size` rows and `_TOKENS` tokens."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(row) > _TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
