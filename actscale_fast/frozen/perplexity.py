"""Perplexity: how likely texts are to a model, as a measure of fluency."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import check_counts
from ..architectures.arguments import accepted_arguments
from ..architectures.layout import layout
from ..modules.evaluation_mode import evaluation_mode
from .batching import forward_arguments
from .encoder import TextEncoder, by_length, check_texts
from .shortcuts import open_frozen_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK_BYTES = 1 << 26  # of fp32 logits at a time: 341 tokens with a vocabulary of 49152


@dataclass(frozen=True, slots=True)
class _Row:
    """The tokens of a prompt and its text; the last `n_scored` of them are scored."""

    ids: list[int]
    n_scored: int


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    paths: dict[str, str] | None = None,
) -> Tensor:
    """exp(−mean log p(token | tokens before)) of each text's tokens, under the model as it is.

    Prompt and text are tokenized separately and joined, so exactly the tokens of the text are scored. Without a prompt,
    or after an empty one, the first token of a text is scored only where the tokenizer puts a special token before it.
    Inside `patch` the patched model judges, and treats prompt and text together as its prompt. To judge text that was
    generated under an intervention by the unpatched model, call this outside the `with` block.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer; the model is left as it was.
        texts: N texts.
        prompts: N prompts, one before each text; None: no prompts.
        batch_size: the number of texts in one forward pass; texts are sorted by length. At most 64 MiB of logits exist
            at a time.
        paths: module paths for a model of an unlisted family.

    Returns:
        fp32 [N] on the CPU, at least 1.

    Raises:
        TypeError: a string in place of a list, or rows that are not strings.
        ValueError: a text with nothing to score, a row longer than the model's context or with tokens that the model
            does not have (the message names the row), or not as many prompts as texts.

    Example::

        perplexity(model, tokenizer, [" a lovely day for a walk."], ["It is"])
    """
    check_counts(batch_size=batch_size)
    check_texts(texts, "texts", plain=True)
    if prompts is not None:
        check_texts(prompts, "prompts", plain=True)
        if len(prompts) != len(texts):
            raise ValueError(f"prompts: got {len(prompts)}, expected one for each of the {len(texts)} texts")
    found = layout(model, paths)
    encoder = TextEncoder(found, tokenizer)
    rows = [
        _row(encoder, text, "" if prompts is None else prompts[index], f"row {index + 1} of texts")
        for index, text in enumerate(texts)
    ]
    scores = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    if not rows:
        return scores.float()
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(found.model))
        probe = forward_arguments(found.model, encoder.batch([rows[0].ids]))  # type: ignore[arg-type]
        head, section = stack.enter_context(open_frozen_model(found, found.model, probe))
        for numbers in by_length([row.ids for row in rows], batch_size):
            chosen = [rows[number] for number in numbers]
            batch = encoder.batch([row.ids for row in chosen])
            arguments = forward_arguments(found.model, batch)  # type: ignore[arg-type]
            width = max(row.n_scored for row in chosen) + 1
            if "logits_to_keep" in accepted_arguments(found.model):  # type: ignore[arg-type]
                arguments["logits_to_keep"] = width
            logits: Callable[[Tensor], Tensor]
            if head is None:
                output, logits = found.model(**arguments).logits, _same
            else:
                output, logits = section.run(arguments, every_token=True)[0], head.logits
            n_scored = torch.tensor([row.n_scored for row in chosen], device=output.device)
            scores[numbers] = _mean_losses(output[:, -width:-1], batch.input_ids[:, 1 - width :], n_scored, logits)
    return scores.exp().float()


def _mean_losses(hidden: Tensor, targets: Tensor, n_scored: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean negative log-likelihood of each row, fp64 [B] on the CPU.

    Args:
        hidden: [B, T, d] (or logits [B, T, V]) at the last T tokens that predict another one.
        targets: int64 [B, T], the predicted tokens.
        n_scored: int64 [B], how many of a row's last tokens count.
        logits: turns hidden states [R, d] into logits [R, V].
    """
    n_columns = targets.shape[1]
    counted = torch.arange(n_columns, device=hidden.device) >= n_columns - n_scored[:, None]  # [B, T]
    scored, wanted = hidden[counted], targets.to(hidden.device)[counted]  # [R, d], [R]
    losses: list[Tensor] = []
    start, size = 0, 1  # the first token tells the width of the vocabulary
    while start < len(wanted):
        z = logits(scored[start : start + size])
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        losses.append(nn.functional.cross_entropy(wide, wanted[start : start + size].to(z.device), reduction="none"))
        start += size
        size = max(_CHUNK_BYTES // (4 * z.shape[-1]), 1)
    every = counted.new_zeros(counted.shape, dtype=torch.float64)
    every[counted] = torch.cat(losses).double().to(every.device)
    return (every.sum(1) / n_scored).cpu()


def _same(logits: Tensor) -> Tensor:
    return logits


def _row(encoder: TextEncoder, text: str, prompt: str, name: str) -> _Row:
    """The checked tokens of a prompt and its text."""
    added = encoder.plain(text, name)
    if not added:
        raise ValueError(f"{name}: {text!r} has no tokens")
    ids = encoder.opened(prompt, name.replace("texts", "prompts", 1)) + added if prompt else encoder.opened(text, name)
    n_scored = min(len(added), len(ids) - 1)
    if not n_scored:
        raise ValueError(f"{name}: {text!r} is one token, which nothing predicts; expected two, or a prompt")
    encoder.check_length(len(ids), name)
    return _Row(ids, n_scored)
