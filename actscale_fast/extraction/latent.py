"""Latent steering vectors: one vector that makes a frozen model say a given sentence (arXiv 2205.05124)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .._checks import check_counts, check_finite, check_not_negative
from ..architectures.layout import layout
from ..architectures.location import check_layers
from ..frozen.encoder import TextEncoder, check_texts
from ..interventions import Intervention, SteerVec
from ..modules.evaluation_mode import evaluation_mode
from ..patching.patch import patch
from .continuations import greedy, start_id
from .latent_search import LatentSearch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Standard deviation of the initial vector of a restart, in units of the stream's size.
_RESTART = 0.5


@dataclass(slots=True)
class LatentResult:
    """The vectors of several sentences, in their order."""

    sentences: list[str]
    #: One per sentence; if it is not exact, the one with the lowest loss.
    vectors: list[SteerVec] = field(repr=False)
    #: Whether greedy decoding with the KV cache returned the sentence.
    exact: list[bool]
    #: Mean −log p of the sentence's tokens and its end token, in nats.
    losses: list[float]
    #: Number of updates for each sentence, over all its starts.
    steps: list[int]
    seconds: float


def latent_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    layer: int,
    every_step: bool = True,
    start: str = "\n",
    ends: bool = True,
    steps: int = 300,
    lr: float = 0.15,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
    paths: dict[str, str] | None = None,
) -> LatentResult:
    """A vector for each sentence that makes the frozen model generate it (arXiv 2205.05124).

    Generation starts from the tokenizer's BOS token (or EOS, or padding, if it has none) and the tokens of `start`. The
    paper starts from the former alone (`start=""`), but in many models the first token of a context has a norm of tens
    of thousands that a vector hardly changes: in SmolLM2-135M, after layer 14, a sentence of ten tokens takes about 8
    steps with the line break, while after 150 steps without it the first word is still wrong. The restarts, the step in
    units of the stream, and the line break are this package's choices; the paper does not give Adam's settings.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left unchanged.
        sentences: N texts.
        layer: z is added to its output (site "residual"); negative from the end. Middle layers work best.
        every_step: add z at every time step; False: only at the token before the first word.
        start: the text after the BOS token that generation starts from; pass the same to `decode_latent`.
        ends: require the token that ends a text after each sentence, so that decoding stops there.
        steps: maximum number of updates for each start.
        lr: Adam's learning rate, in units of the stream's size after `layer` (median over tokens of the RMS).
        restarts: further starts, from random vectors, for a sentence that the start from z = 0 does not solve.
        seed: random seed of the restarts.
        batch_size: sentences per forward pass.
        progress: show a progress bar.
        paths: module paths for a model whose structure is not recognised.

    Raises:
        TypeError, ValueError: invalid arguments, or a sentence without tokens or longer than the context.
        RuntimeError: called under torch.inference_mode().

    Example:
        >>> result = latent_vectors(model, tokenizer, ["The cat sat on the mat."], layer=14)
        >>> decode_latent(model, tokenizer, result.vectors[0])
        'The cat sat on the mat.'
    """
    from tqdm.auto import tqdm

    begun = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise RuntimeError("latent_vectors needs gradients and cannot run under torch.inference_mode()")
    check_finite(lr=lr)
    if lr <= 0:
        raise ValueError(f"lr: got {lr!r}, expected a positive number")
    check_not_negative(restarts=restarts)
    check_counts(steps=steps, batch_size=batch_size)
    found = layout(model, paths)
    number = check_layers([layer], found.n_layers)[0]
    encoder = TextEncoder(found, tokenizer)
    opening = _opening(encoder, start)
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    targets = []
    for row, sentence in enumerate(check_texts(sentences, "sentences"), 1):
        name = f"row {row} of sentences"
        ids = encoder.plain(sentence, name)
        if not ids:
            raise ValueError(f"{name}: {sentence!r} has no tokens")
        encoder.check_length(len(opening) + len(ids) + len(end), name)
        targets.append(ids + end)
    positions = None if every_step else [len(opening) - 1]
    location = SteerVec.for_model(model, "residual", [number], positions, **(paths or {})).location  # type: ignore[arg-type]
    vectors: list[SteerVec] = []
    exact: list[bool] = []
    losses: list[float] = []
    taken: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(targets)), key=lambda row: len(targets[row]))
    with torch.enable_grad(), evaluation_mode(found.model), tqdm(
        total=len(targets), desc="latent vectors", disable=not progress, unit="sentence", dynamic_ncols=True
    ) as bar:  # fmt: skip
        for first in range(0, len(order), batch_size):
            wanted = [targets[row] for row in order[first : first + batch_size]]
            search = LatentSearch(found, location, opening, wanted, encoder)
            with search:
                for attempt in range(1 + restarts):
                    search.start(_RESTART if attempt else 0.0, generator)
                    search.descend(steps, lr, bar)
            bar.update(len(wanted) - search.n_solved)
            vectors += search.vectors()
            losses += search.losses
            taken += search.taken
            exact += _decoded(model, tokenizer, vectors[-len(wanted) :], opening, wanted, end)
    rows = sorted(range(len(order)), key=order.__getitem__)
    return LatentResult(
        sentences=list(sentences),
        vectors=[vectors[row] for row in rows],
        exact=[exact[row] for row in rows],
        losses=[losses[row] for row in rows],
        steps=[taken[row] for row in rows],
        seconds=time.perf_counter() - begun,
    )


def decode_latent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: Intervention,
    max_new_tokens: int = 64,
    *,
    start: str = "\n",
    strength: float = 1.0,
) -> str:
    """What the model generates greedily under `vector`, from the start that `latent_vectors` uses.

    Args:
        model, tokenizer: as in `latent_vectors`.
        vector: one of its vectors, or arithmetic on them: `z + 0.5 * (mean_vector(glad) - mean_vector(sad))`.
        max_new_tokens: maximum number of tokens, limited by the context.
        start: as in `latent_vectors`.
        strength: β.
    """
    check_counts(max_new_tokens=max_new_tokens)
    encoder = TextEncoder(layout(model, vector.paths), tokenizer)
    opening = _opening(encoder, start)
    if encoder.context is not None:
        max_new_tokens = min(max_new_tokens, encoder.context - len(opening))
    with patch(model, vector, strength=strength):
        ids = greedy(model, tokenizer, encoder.batch([opening]), max_new_tokens)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def mean_vector(vectors: Sequence[SteerVec]) -> SteerVec:
    """The mean of steering vectors at one location.

    Raises:
        TypeError, ValueError: no vectors, anything but unstacked `SteerVec`s, or different locations.
    """
    parts = list(vectors)
    if not parts or any(type(part) is not SteerVec or part.n_groups is not None for part in parts):
        raise TypeError(f"vectors: got {[type(part).__name__ for part in parts]}, expected at least one SteerVec")
    if any(part.location != parts[0].location for part in parts):
        raise ValueError("vectors: their layers, positions or models differ, expected one location")
    mean = SteerVec(parts[0].location, device=parts[0].device)
    with torch.no_grad():
        mean.vectors.copy_(torch.stack([part.vectors.to(mean.device) for part in parts]).double().mean(0))
    return mean


def _opening(encoder: TextEncoder, start: str) -> list[int]:
    return [*encoder.known([start_id(encoder.tokenizer)], "tokenizer"), *encoder.plain(start, "start")]


def _decoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vectors: list[SteerVec], opening: list[int],
    targets: list[list[int]], end: list[int],
) -> list[bool]:  # fmt: skip
    """Whether greedy decoding gives each sentence."""
    encoder = TextEncoder(layout(model, vectors[0].paths), tokenizer)
    n_rows, longest = len(vectors), max(map(len, targets))
    with patch(model, SteerVec.stack(vectors), group=torch.arange(n_rows, device="cpu")):
        made = greedy(model, tokenizer, encoder.batch([opening] * n_rows), longest + 1)
    sentences = [ids[: len(ids) - len(end)] for ids in targets]
    return [(ids if end else ids[: len(wanted)]) == wanted for ids, wanted in zip(made, sentences, strict=True)]
