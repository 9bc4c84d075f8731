"""What an intervention does to text that has nothing to do with it: perplexity, and divergence of the next token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import ops
from ...architectures.layout import layout
from ...frozen.batching import forward_arguments
from ...frozen.encoder import TextEncoder, by_length, check_texts
from ...frozen.perplexity import perplexity
from ...frozen.shortcuts import open_frozen_model
from ...frozen.stored_activations import source_activations
from ...interventions import Intervention
from ...modules.evaluation_mode import evaluation_mode
from ...patching.patch import patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Plain texts, written for this package.
TEXTS = (
    "The bakery at the corner opens at six. By half past six the first rolls are sold, and the smell of warm bread "
    "drifts down the street. People who come after nine often find that the best loaves are gone.",
    "To plant a young tree, dig a hole twice as wide as its roots, loosen the soil at the bottom, and water it well. "
    "The trunk should stand as deep as it did in the nursery, and a stake keeps it upright in the wind.",
    "My grandmother kept her letters in a tin box under the bed. She never spoke about them, but on rainy evenings "
    "she would take one out, read it slowly, and put it back with a smile.",
    "Sound travels faster in water than in air, because the molecules of water are closer together. That is why "
    "divers hear a boat long before they can tell where it comes from.",
    "The meeting was moved to Thursday because two members of the committee were ill. The agenda stays the same: the "
    "budget for the next year, the repair of the roof, and the election of a new treasurer.",
    "After the match the players sat in the dressing room without a word. They had led until the last minute, and "
    "then a single careless pass had cost them the cup.",
    "A good knife needs little force. Hold it with a loose wrist, let the weight of the blade do the work, and "
    "sharpen it before it becomes dull rather than after.",
    "The train was late again, so I walked along the platform and counted the windows of the old warehouse on the "
    "other side of the tracks. There were forty-two, and nine of them were broken.",
)
#: Beginnings of texts on other subjects than those of the built-in tasks, written for this package.
PROMPTS = (
    "The best time to water the garden is", "She opened the window because the room was", "Two plus three is",
    "To make a good soup, you first need", "The cat jumped onto the table and", "In winter the days are shorter than",
    "He could not find his keys, so he", "The doctor told me that I should", "A triangle has three",
    "My favourite season is",
    "The children laughed when the clown", "Once the water boils, add the", "The price of the ticket depends on",
    "On the shelf beside the door stood a", "Most birds build their nests in", "If it rains tomorrow, we will",
)  # fmt: skip


def refuse_other_sources(intervention: Intervention) -> None:
    """Raise a ValueError for a part that takes activations from a second prompt, which a plain text does not have."""
    for part in intervention.singles:
        if part.needs_source and not part.source_is_prompt:
            raise ValueError(
                f"intervention: got a {type(part).__name__}, which takes activations from a second prompt, but plain "
                "texts have none; give texts=[] and prompts=[] to leave them out"
            )


def why_not_steered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, texts: Sequence[str]
) -> str | None:
    """Why the perplexity of these texts would not be that under the intervention; None: it is.

    To `patch` a whole text is a prompt. An intervention at listed positions then steers these of its tokens alone: with
    positions=[-1] only the last, whose prediction no token of the text follows.
    """
    limited = [part for part in intervention.singles if part.location.positions is not None]
    if not limited:
        return None
    rows = TextEncoder(layout(model, intervention.paths), tokenizer).prompts(texts, "texts")
    for part in limited:
        positions = part.location.positions or ()
        for row in rows:
            if not set(range(len(row))) <= {at + len(row) if at < 0 else at for at in positions}:
                listed = f"{', '.join(map(str, positions[:4]))}{', …' if len(positions) > 4 else ''}"
                return (
                    f"the {type(part).__name__} acts at the positions {listed} of a prompt, so that it would not "
                    "steer every token of a text"
                )
    return None


def log_perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, texts: Sequence[str],
    strengths: Sequence[float], batch_size: int,
) -> Tensor:  # fmt: skip
    """log perplexity of each text in the frozen model, and then under each strength; fp64 [1 + strengths, N]."""
    check_texts(texts, "texts", plain=True)
    found = [perplexity(model, tokenizer, texts, batch_size=batch_size, paths=intervention.paths)]
    alone = any(part.needs_source for part in intervention.singles)
    parts = [[text] for text in texts] if alone else [list(texts)]
    for strength in strengths:
        made = []
        for some in parts:
            with (
                _own_sources(model, tokenizer, intervention, some, batch_size),
                patch(model, intervention, strength=strength),
            ):
                made.append(perplexity(model, tokenizer, some, batch_size=batch_size, paths=intervention.paths))
        found.append(torch.cat(made))
    return torch.stack(found).double().log()


@torch.no_grad()
def next_token_divergences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, prompts: Sequence[str],
    strengths: Sequence[float], batch_size: int,
) -> Tensor:  # fmt: skip
    """KL(frozen ‖ steered) of the token after each prompt, in nats, over the whole vocabulary; fp64 [strengths, N]."""
    found = layout(model, intervention.paths)
    encoder = TextEncoder(found, tokenizer)
    rows = encoder.prompts(prompts, "prompts")
    values = torch.zeros(len(strengths), len(rows), dtype=torch.float64, device="cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        head, section = stack.enter_context(
            open_frozen_model(found, model, forward_arguments(model, encoder.batch([rows[0]])))
        )
        for numbers in by_length(rows, batch_size):
            arguments = forward_arguments(model, encoder.batch([rows[number] for number in numbers]))
            output = section.run(arguments)[0]
            reference = output if head is None else head.logits(output)
            texts = [prompts[number] for number in numbers]
            for index, strength in enumerate(strengths):
                with (
                    _own_sources(model, tokenizer, intervention, texts, batch_size),
                    patch(model, intervention, strength=strength),
                ):
                    output = section.run(arguments)[0]
                logits = output if head is None else head.logits(output)
                values[index, numbers] = ops.kl_div_from_logits(logits, reference).double().cpu()
    return values


@contextlib.contextmanager
def _own_sources(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, intervention: Intervention, texts: Sequence[str],
    batch_size: int,
) -> Iterator[None]:  # fmt: skip
    """Within it, parts that take activations from a first run on the same text have those of these rows."""
    with contextlib.ExitStack() as stack:
        for part in intervention.singles:
            if part.needs_source:
                values = source_activations(model, tokenizer, part, texts, batch_size=batch_size)
                stack.enter_context(part.interchange(values))
        yield
