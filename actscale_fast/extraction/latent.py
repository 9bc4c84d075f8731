"""Latent steering vectors: one vector that makes a frozen model say a given sentence (arXiv 2205.05124)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .._checks import check_counts, check_finite
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

#: Standard deviation of a restart's first vector, in units of the stream's size.
_RESTART = 0.5


@dataclass(slots=True)
class LatentResult:
    """The vectors of some sentences, in their order."""

    sentences: list[str]
    #: One a sentence: where it is not exact, the one with the lowest loss that was met.
    vectors: list[SteerVec] = field(repr=False)
    #: Whether greedy decoding with the KV cache returned the sentence.
    exact: list[bool]
    #: Mean of −log p over the sentence's tokens and the one that ends it, in nats, at the vector returned.
    losses: list[float]
    #: Updates that each sentence took, those of all its starts together.
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
    """A vector for each sentence under which the frozen model says it, from nothing (arXiv 2205.05124).

    Generation starts from the token that opens a text (or ends one, or pads, where the tokenizer has none) and the
    tokens of `start`. The paper starts from the former alone (`start=""`). The first token of a context serves many
    models as a resting place for attention, with a norm of tens of thousands that a vector hardly moves, so that the
    first word takes hundreds of steps: in SmolLM2-135M, behind layer 14, a sentence of ten tokens takes about 8 steps
    with the line break, and after 150 steps without it all words but the first are there.

    The starts, the step in units of the stream, and the line break are this package's; the paper leaves Adam's settings
    open.

    Args:
        model, tokenizer: a causal language model of Hugging Face and its tokenizer; the model is left as it was.
        sentences: N texts.
        layer: z is added to its output (site "residual"); negative from the end. Middle layers do best.
        every_step: add z at every time step; False: at the first one only, the token that the first word follows.
        start: the text behind the opening token that generation starts from; `decode_latent` must be given the same.
        ends: ask for the token that ends a text behind each sentence, so that decoding stops there.
        steps: updates at most, of each start.
        lr: Adam's, in units of the stream's size behind `layer` (median over tokens of the root mean square).
        restarts: further starts for a sentence that the one from z = 0 did not give, from random vectors.
        seed: of those.
        batch_size: sentences in one forward pass.
        progress: show a progress bar.
        paths: module paths of a model of an unlisted family.

    Raises:
        TypeError, ValueError: bad arguments, a sentence without tokens or longer than the context.
        RuntimeError: under torch.inference_mode(), which gradients cannot be enabled in.

    Example:
        >>> result = latent_vectors(model, tokenizer, ["The cat sat on the mat."], layer=14)
        >>> decode_latent(model, tokenizer, result.vectors[0])
        'The cat sat on the mat.'
    """
    from tqdm.auto import tqdm

    begun = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise RuntimeError("latent_vectors needs gradients, which torch.inference_mode() rules out")
    check_finite(lr=lr)
    if lr <= 0:
        raise ValueError(f"lr: got {lr!r}, expected a positive number")
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise ValueError(f"restarts: got {restarts!r}, expected an integer >= 0")
    check_counts(steps=steps, batch_size=batch_size)
    found = layout(model, paths)
    number = check_layers([layer], found.n_layers)[0]
    encoder = TextEncoder(found, tokenizer)
    opening = _opening(encoder, start)
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    targets = []
    for row, sentence in enumerate(check_texts(sentences, "sentences")):
        name = f"sentences: row {row}"
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
    """What the model says from nothing under `vector`, greedily and with the KV cache.

    Args:
        model, tokenizer: as `latent_vectors` had them.
        vector: one of its vectors, or arithmetic on them: `z + 0.5 * (mean_vector(glad) - mean_vector(sad))`.
        max_new_tokens: at most so many, and no more than the context holds; a text that ends does so before.
        start: as `latent_vectors` had it.
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
        TypeError, ValueError: none given, others than plain `SteerVec`s, or different locations.
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
    return [start_id(encoder.tokenizer), *encoder.plain(start, "start")]


def _decoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vectors: list[SteerVec], opening: list[int],
    targets: list[list[int]], end: list[int],
) -> list[bool]:  # fmt: skip
    """Whether greedy decoding from the opening gives each sentence."""
    encoder = TextEncoder(layout(model, vectors[0].paths), tokenizer)
    n_rows, longest = len(vectors), max(map(len, targets))
    with patch(model, SteerVec.stack(vectors), group=torch.arange(n_rows, device="cpu")):
        made = greedy(model, tokenizer, encoder.batch([opening] * n_rows), longest + 1)
    sentences = [ids[: len(ids) - len(end)] for ids in targets]
    return [(ids if end else ids[: len(wanted)]) == wanted for ids, wanted in zip(made, sentences, strict=True)]
