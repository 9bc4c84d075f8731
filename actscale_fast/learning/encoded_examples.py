"""Examples as checked token ids on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..architectures.layout import embedding_weight, input_device, layout, unwrap
from ..frozen.batching import Batch, left_padded, open_ids, pad_id_of, padding_known
from ..tasks.examples import Example, check_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EncodedExamples:
    """Examples as token ids on one device, checked once so that no step has to.

    Args:
        examples, tokenizer, model: as `fit` takes them.
        paths: `Location.paths` of an intervention on a model of an unlisted family.

    Raises:
        TypeError: a model that is not Hugging Face's, no tokenizer, rows that are no examples.
        ValueError: no examples, an answer that is not one known token, answers that are the same token, an empty
            prompt, one longer than the model's context or with tokens it does not have; each names the row.
    """

    model: nn.Module | None = None  # the Hugging Face model inside of wrappers
    #: Whether prompts of one length only stand in a batch, whatever the model does with padding.
    alike_only: bool = False

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        paths: dict[str, str] | None = None,
    ) -> None:
        found = layout(model, paths)
        self.model = unwrap(model)
        if not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
            raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected a Hugging Face tokenizer")
        self.examples = check_examples(examples)
        embedding: Tensor = embedding_weight(found.model)
        self.device = input_device(model)
        self.pad_id = pad_id_of(tokenizer)
        context, width = found.max_context, model.config.get_text_config().vocab_size
        self.prompts: list[list[int]] = []
        correct: list[int] = []
        wrong: list[int] = []
        for row, example in enumerate(self.examples):
            ids = open_ids(tokenizer, example.prompt)
            if not ids:
                raise ValueError(f"examples: row {row}: the prompt {example.prompt!r} has no tokens")
            if context is not None and len(ids) > context:
                raise ValueError(f"examples: row {row} has {len(ids)} tokens, expected at most the model's {context}")
            if max(ids) >= embedding.shape[0]:
                raise ValueError(
                    f"examples: row {row}: the prompt has token id {max(ids)}, expected less than the model's "
                    f"{embedding.shape[0]}; is the tokenizer that of another model?"
                )
            self.prompts.append(ids)
            for name, kept in (("correct", correct), ("wrong", wrong)):
                token = _answer_token(tokenizer, example.prompt, ids, getattr(example, name), f"row {row}, {name}")
                if token >= width:
                    raise ValueError(f"examples: row {row}, {name}: token id {token}, expected less than {width}")
                kept.append(token)
            if correct[-1] == wrong[-1]:
                raise ValueError(
                    f"examples: row {row}: correct {example.correct!r} and wrong {example.wrong!r} are one token"
                )
        self.correct = torch.tensor(correct, device=self.device)  # [N]
        self.wrong = torch.tensor(wrong, device=self.device)  # [N]

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, batch_size: int) -> list[list[int]]:
        """All rows in batches of similar length, so that little is padded."""
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
        """Whether prompts of several lengths may stand in one batch: the model leaves padded ones as they are."""
        return not self.alike_only and (self.model is None or padding_known(self.model) is not False)

    def batch(self, rows: Sequence[int], multiple: int = 1) -> Batch:
        """The prompts of these rows, padded on the left to the longest of them.

        With a `multiple` to one of it, though to no more than the longest prompt of all: few widths occur.
        """
        prompts = [self.prompts[row] for row in rows]
        length = max(map(len, prompts))
        if multiple > 1:
            length = min(-(-length // multiple) * multiple, max(map(len, self.prompts)))
        return left_padded(prompts, self.pad_id, self.device, length)


def _answer_token(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], answer: str, where: str
) -> int:
    """The one token that `answer` adds to the prompt, as the tokenizer itself splits the two together."""
    joined = open_ids(tokenizer, prompt + answer)
    added = joined[len(prompt_ids) :]
    if joined[: len(prompt_ids)] != prompt_ids:  # tokens merge across the border
        added = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if len(added) != 1:
        tokens = tokenizer.convert_ids_to_tokens(added)
        hint = "" if answer[:1].isspace() else f"; did you mean {' ' + answer!r}, with its leading space?"
        raise ValueError(f"examples: {where}: {answer!r} is {len(added)} tokens {tokens}, expected one{hint}")
    if added[0] == tokenizer.unk_token_id and answer.strip() != tokenizer.unk_token:
        raise ValueError(f"examples: {where}: {answer!r} is no token of the tokenizer (it reads {tokenizer.unk_token})")
    return int(added[0])
