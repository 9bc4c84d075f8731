"""How `actscale-fast generate` makes its texts: greedily in one batch, drawn from a seed, or token by token."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..extraction.continuations import Sampling, generated
from .output import continuations, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..interventions import Intervention


def generate_texts(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    intervention: Intervention,
    prompts: Sequence[Any],
    strengths: Sequence[float],
    sources: Sequence[Any],
) -> list[list[str]]:
    """The continuations of each prompt, one per strength; printed while they are made, with --stream.

    Raises:
        ValueError: --top-p without --temperature, or --stream together with --json.
    """
    if options.top_p is not None and not options.temperature:
        raise ValueError("--top-p needs a --temperature above 0; without one, generation is greedy")
    if options.stream and options.json:
        raise ValueError("--stream cannot be used with --json, which prints one document at the end")
    run = functools.partial(continuations, model, tokenizer, intervention, max_new_tokens=options.max_new_tokens)
    sampling = None
    if options.temperature:
        sampling = Sampling(options.temperature, options.top_p or 1.0, options.seed)
    if sampling is None and not options.stream:
        return run(prompts, strengths, sources=sources)
    # One row at a time, each from the same seed: a text depends on neither the other prompts nor the other strengths.
    texts: list[list[str]] = []
    for number, prompt in enumerate(prompts):
        if options.stream:
            show(f"{options.prompt[number]}")
        texts.append([])
        for strength in strengths:
            decode = functools.partial(generated, sampling=sampling, streamer=_streamer(options, tokenizer, strength))
            (answers,) = run([prompt], [strength], sources=sources[number : number + 1], decode=decode)
            texts[-1] += answers
    return texts


def _streamer(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, strength: float) -> Any:
    """What prints the tokens of one text after its strength; None without --stream."""
    if not options.stream:
        return None
    from transformers import TextStreamer

    print(f"β = {strength:+g}: " if strength else "β = 0: ", end="", flush=True)
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]


def as_result(prompts: Sequence[str], strengths: Sequence[float], texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The texts for --json."""
    return {
        "prompts": [
            {
                "prompt": prompt,
                "continuations": [
                    {"strength": strength, "text": text} for strength, text in zip(strengths, answers, strict=True)
                ],
            }
            for prompt, answers in zip(prompts, texts, strict=True)
        ]
    }
