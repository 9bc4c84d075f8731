"""What commands print: tables, evaluations and continuations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..architectures.layout import layout
from ..extraction.continuations import greedy
from ..frozen.chat import Messages
from ..frozen.encoder import TextEncoder
from ..frozen.stored_activations import source_activations
from ..patching.patch import patch
from .verbosity import is_quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..interventions import Intervention
    from ..learning import Evaluation

Decode = Callable[..., list[list[int]]]

#: Characters per line of a table that goes into a file, at most.
_WIDEST = 240


def say(text: str = "") -> None:
    """Print one line that is not a result; nothing with --quiet."""
    if not is_quiet():
        show(text)


def show(text: str = "") -> None:
    """Print one line of a result and flush it."""
    print(text, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> None:
    """Print a table; columns after the first are aligned to the right unless `right` is False."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = right and index > 0
        table.add_column(column, justify="right" if number else "left", no_wrap=number or index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    wide = Console(width=_WIDEST, highlight=False)
    needed = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(110, needed), highlight=False).print(table)


def print_evaluation(title: str, evaluation: Evaluation) -> None:
    """Print the figures before and after, side by side, with their intervals."""
    columns, rows = evaluation.table()
    print_table(f"{title} ({evaluation.n_examples} prompts)", columns, rows)


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    intervention: Intervention,
    prompts: Sequence[str | Messages],
    strengths: Sequence[float],
    max_new_tokens: int,
    *,
    sources: Sequence[str | Messages] = (),
    decode: Decode = greedy,
) -> list[list[str]]:
    """The continuations of each prompt, one per strength, in one batch.

    Args:
        prompts: texts, or conversations for the chat template.
        sources: one for each prompt, if the intervention takes activations from a second prompt.

    Raises:
        ValueError: an empty prompt, one that exceeds the model's context with the new tokens, or sources that are
            missing or not used.
    """
    encoder = TextEncoder(layout(model, intervention.paths), tokenizer)
    rows = [encoder.prompt(prompt, "prompt") for prompt in prompts]
    longest = max(map(len, rows))
    if encoder.context is not None and longest + max_new_tokens > encoder.context:
        raise ValueError(
            f"prompt: {longest} tokens and {max_new_tokens} new ones exceed the model's context of {encoder.context}"
        )
    times = len(strengths)
    batch = encoder.batch([ids for ids in rows for _ in strengths])
    strength = torch.tensor(strengths, dtype=torch.float32, device="cpu").repeat(len(rows))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        check_sources(intervention, sources, len(prompts))
        for part in intervention.singles:
            if part.needs_source:
                from_texts = list(prompts if part.source_is_prompt else sources)
                values = source_activations(model, tokenizer, part, from_texts)
                stack.enter_context(part.interchange(values.repeat_interleave(times, 0)))
        stack.enter_context(patch(model, intervention, strength=strength))
        made = decode(model, tokenizer, batch, max_new_tokens)
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]
    return [texts[start : start + times] for start in range(0, len(texts), times)]


def check_sources(intervention: Intervention, sources: Sequence[str | Messages], n_prompts: int) -> None:
    """Raise a ValueError unless each prompt has a source exactly if the intervention needs one."""
    needed = any(part.needs_source and not part.source_is_prompt for part in intervention.singles)
    if needed and len(sources) != n_prompts:
        raise ValueError(f"source: got {len(sources)} for {n_prompts} prompts, but an interchange needs one for each")
    if sources and not needed:
        raise ValueError("source: this intervention exchanges nothing, so no prompt needs one")


def print_continuations(prompt: str, strengths: Sequence[float], texts: Sequence[str]) -> None:
    """Print a prompt and its continuations, one per strength."""
    show(prompt)
    labels = [f"{strength:+g}" if strength else "0" for strength in strengths]
    rows = [(label, text.strip().replace("\n", "⏎")) for label, text in zip(labels, texts, strict=True)]
    print_table("", ("β", "continuation"), rows, right=False)
