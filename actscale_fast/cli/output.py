"""What commands print and write: tables on stdout, JSON files that appear whole."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..models import layout, patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..interventions import Intervention
    from ..learning import Evaluation


def say(text: str = "") -> None:
    """One line of plain text, at once."""
    print(text, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> None:
    """A table; all columns after the first are numbers, aligned to the right, unless `right` is False."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = right and index > 0
        table.add_column(column, justify="right" if number else "left", no_wrap=number or index == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else 110
    Console(width=width, highlight=False).print(table)


def print_evaluation(title: str, evaluation: Evaluation) -> None:
    """Before and after, side by side."""
    print_table(f"{title} ({evaluation.n_examples} prompts)", ("", "before", "after"), evaluation.rows())


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    intervention: Intervention,
    prompt: str,
    strengths: Sequence[float],
    max_new_tokens: int,
    *,
    special_tokens: bool = True,
) -> list[str]:
    """The greedy continuation of one prompt under each strength, all in one batch.

    `special_tokens=False` is for a prompt that has them already, such as one from a chat template.

    Raises:
        ValueError: an empty prompt, or one that with the new tokens is longer than the model's context.
    """
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=special_tokens).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError(f"prompt: got {prompt!r}, which has no tokens")
    context = layout(model, intervention.paths).max_context
    if context is not None and length + max_new_tokens > context:
        raise ValueError(f"prompt: {length} tokens and {max_new_tokens} new ones, but the model's context is {context}")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = {name: inputs[name].expand(len(strengths), -1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), patch(model, intervention, strength=torch.tensor(strengths, dtype=torch.float32)):
        tokens = model.generate(  # type: ignore[operator]  # transformers types it as an attribute of a module
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
    return tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)


def print_continuations(prompt: str, strengths: Sequence[float], texts: Sequence[str]) -> None:
    """A prompt and its continuations, one a strength."""
    say(prompt)
    labels = [f"{strength:+g}" if strength else "0" for strength in strengths]
    rows = [(label, text.strip().replace("\n", "⏎")) for label, text in zip(labels, texts, strict=True)]
    print_table("", ("β", "continuation"), rows, right=False)
