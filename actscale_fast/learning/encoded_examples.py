"""Examples as checked token ids on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..architectures.hugging_face import unwrap
from ..architectures.layout import layout
from ..frozen.batching import Batch, left_padded, padding_known
from ..frozen.encoder import TextEncoder
from ..tasks.examples import Example, prompt_of
from ..tasks.loading import ExampleSource, examples_from
from .prompt_spaces import warn_of_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EncodedExamples:
    """Examples as token ids on one device, checked once so that no step has to.

    Args:
        examples, tokenizer, model: as for `fit`.
        paths: `Location.paths` of an intervention, for a model of an unlisted family.

    Raises:
        TypeError: not a Hugging Face model or tokenizer, or rows that are not examples.
        ValueError: no examples, an answer that is not one known token, two answers that are the same token, or a prompt
            that is empty, longer than the model's context or has unknown tokens; the message names the row.

    Prompts that end with a space, and answers that begin with one after a chat template's line break, are a warning.
    """

    model: nn.Module | None = None  # the Hugging Face model inside wrappers
    #: Whether batches hold only prompts of one length, even if the model handles padding.
    alike_only: bool = False

    def __init__(
        self,
        examples: ExampleSource,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        paths: dict[str, str] | None = None,
    ) -> None:
        found = layout(model, paths)
        self.model = unwrap(model)
        encoder = TextEncoder(found, tokenizer)
        self.examples = examples_from(examples)
        self.device, self.pad_id = encoder.device, encoder.pad_id
        width = model.config.get_text_config().vocab_size
        self.prompts: list[list[int]] = []
        correct: list[int] = []
        wrong: list[int] = []
        for example in self.examples:
            where = str(example.where)
            ids = encoder.prompt(prompt_of(example), where)
            self.prompts.append(ids)
            for name, kept in (("correct", correct), ("wrong", wrong)):
                token = _answer_token(encoder, example, ids, name)
                if token >= width:
                    raise ValueError(f"{where}, {name}: token id {token}, expected less than {width}")
                kept.append(token)
            if correct[-1] == wrong[-1]:
                raise ValueError(f"{where}: correct {example.correct!r} and wrong {example.wrong!r} are one token")
        warn_of_spaces(self.examples, tokenizer)
        self.correct = torch.tensor(correct, device=self.device)  # [N]
        self.wrong = torch.tensor(wrong, device=self.device)  # [N]

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All rows in batches of similar length, so that there is little padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.prompts[row]))
        batches: list[list[int]] = []
        for row in order:
            alike = self.pads or (batches and len(self.prompts[batches[-1][0]]) == len(self.prompts[row]))
            if batches and alike and len(batches[-1]) < batch_size:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may share a batch, because padding does not change their results."""
        return not self.alike_only and (self.model is None or padding_known(self.model) is not False)

    def batch(self, rows: Sequence[int], multiple: int = 1) -> Batch:
        """The prompts of these rows, padded on the left to the longest of them.

        Args:
            rows: the rows.
            multiple: pad to a multiple of this, but not beyond the longest prompt of all, so that few widths occur.
        """
        prompts = [self.prompts[row] for row in rows]
        length = max(map(len, prompts))
        if multiple > 1:
            length = min(-(-length // multiple) * multiple, max(map(len, self.prompts)))
        return left_padded(prompts, self.pad_id, self.device, length)


def _answer_token(encoder: TextEncoder, example: Example, prompt_ids: list[int], name: str) -> int:
    """The single token that an answer adds to the prompt when the tokenizer splits both together."""
    tokenizer, answer, where = encoder.tokenizer, getattr(example, name), f"{example.where}, {name}"
    joined = encoder.opened(prompt_of(example), where, then=answer)
    added = joined[len(prompt_ids) :]
    if joined[: len(prompt_ids)] != prompt_ids:  # tokens merge across the boundary
        added = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(added) != 1:
        tokens = tokenizer.convert_ids_to_tokens(added)
        hint = "" if answer[:1].isspace() else f"; did you mean {' ' + answer!r}, with its leading space?"
        raise ValueError(f"{where}: {answer!r} is {len(added)} tokens {tokens}, expected one{hint}")
    if added[0] == tokenizer.unk_token_id and answer.strip() != tokenizer.unk_token:
        raise ValueError(f"{where}: {answer!r} is not a token of the tokenizer (it reads {tokenizer.unk_token})")
    return int(added[0])
