"""What a method of head selection gets, and what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from ...architectures.layout import layout
from ...architectures.sharding import is_sharded
from ...frozen.batching import forward_arguments
from ...frozen.encoder import TextEncoder
from ...frozen.shortcuts import open_frozen_model
from ...interventions import ActivScalar, Intervention
from ...modules.evaluation_mode import evaluation_mode
from ...patching.patch import Patch
from ...tasks.examples import Example, prompt_of
from ..answer_batch import answer_batch
from ..answer_scores import answer_log_probabilities
from ..encoded_examples import EncodedExamples
from ..execution import CACHE_BYTES
from ..fit_settings import FitSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scored(NamedTuple):
    """What a method finds, on the CPU."""

    scores: Tensor  # fp32 [L, H]; the heads with the largest are chosen
    directions: Tensor  # fp32 [L, H]: α of each head at strength 1, if it is chosen
    #: Further findings by name, as JSON can hold them.
    details: dict[str, Any] = {}  # noqa: RUF012 (never changed)


@dataclass(frozen=True)
class Subject:
    """A model with the examples that heads are scored on.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        examples: prompts with their two answers.
        layers: the layers whose heads are scored; None: all that have heads.
        batch_size: the largest number of prompts in one pass.
        seed: seed of whatever a method draws.
        progress: show progress bars.
        later: examples that the intervention will also run on; a RunTwice has positions for their prompts too.

    Raises:
        TypeError, ValueError: bad examples, or layers that the model does not have.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    layers: Sequence[int] | None = None
    batch_size: int = 32
    seed: int = 0
    progress: bool = False
    cache_bytes: int = CACHE_BYTES
    later: Sequence[Example] = ()
    data: EncodedExamples = field(init=False)
    #: One scalar per head, all 0: where the heads are.
    scalars: ActivScalar = field(init=False)

    def __post_init__(self) -> None:
        scalars = ActivScalar.for_model(self.model, "head", self.layers)
        object.__setattr__(self, "scalars", scalars)
        object.__setattr__(self, "data", EncodedExamples(self.examples, self.tokenizer, self.model, scalars.paths))

    @property
    def shape(self) -> tuple[int, int]:
        """(L, H): the chosen layers, and the heads of the one that has the most."""
        n_layers, _, n_heads = self.scalars.alpha.shape
        return n_layers, n_heads

    @property
    def exists(self) -> Tensor:
        """bool [L, H]: the heads that there are; layers may have fewer than H."""
        location, (n_layers, n_heads) = self.scalars.location, self.shape
        own = torch.tensor([location.heads_of(index) for index in range(n_layers)], device="cpu")
        return torch.arange(n_heads, device="cpu") < own[:, None]

    def longest_prompt(self) -> int:
        """The most tokens that a prompt of the examples, or of the later ones, has."""
        encoder = TextEncoder(layout(self.model, self.scalars.paths), self.tokenizer)
        later = (len(encoder.prompt(prompt_of(example), str(example.where))) for example in self.later)
        return max(*map(len, self.data.prompts), *later, 0)

    def refuse_sharded_weights(self, method: str) -> None:
        """Raise a ValueError if the model's output head could not be read because it is sharded over processes."""
        if is_sharded(self.model):
            raise ValueError(
                f"method: {method!r} reads weights of the output head, which is sharded over processes in a way that "
                "is not read; choose the heads on a whole model, or by another method"
            )

    def require_equal_heads(self, method: str) -> None:
        """Raise a ValueError unless all layers have heads of one number and width, as stored activations need."""
        unusual = self.scalars.location.heads
        if unusual:
            raise ValueError(
                f"method: {method!r} needs layers whose heads have one number and width, but those of layer "
                f"{min(unusual)} differ; leave it out of `layers`"
            )


class AnswerPasses:
    """Log-probabilities of the examples' answers under an intervention; a context manager that opens the model.

    Args:
        subject: the model, which is frozen and in evaluation mode meanwhile, and the examples.
        intervention: a single one, or a stack for several row groups.
    """

    def __init__(self, subject: Subject, intervention: Intervention) -> None:
        self.subject, self.intervention = subject, intervention
        self.found = layout(subject.model, intervention.paths)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        model: Any = self.found.model
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            arguments = forward_arguments(model, self.subject.data.batch([0]))
            self.head, self.section = stack.enter_context(open_frozen_model(self.found, model, arguments))
            stacked = self.intervention.n_groups is not None
            group = torch.zeros(0, dtype=torch.int64, device="cpu") if stacked else None
            self.patched = stack.enter_context(Patch(model, self.intervention, group=group))
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def log_probabilities(self, rows: Sequence[int]) -> Tensor:
        """log p(correct) and log p(wrong) of these examples, all of one kind: [B, 2]; of a stack [G, B, 2]."""
        data, n_groups = self.subject.data, self.intervention.n_groups
        model: Any = self.found.model
        repeated = [*rows] * (n_groups or 1)
        group = None
        if n_groups is not None:
            group = torch.arange(n_groups, device="cpu").repeat_interleave(len(rows))
        if rows[0] in data.long_answers:
            made = answer_batch(data, repeated)
            self.patched.group = None if group is None else group.repeat(2)
            with made.announced(self.patched):
                output = self.section.run(made.arguments(model), every_token=True)[0][:, -made.n_last :]
        else:
            batch = data.batch(repeated)
            self.patched.group = group
            mask = batch.attention_mask if batch.padded else None
            with self.patched.prompt(batch.input_ids.shape[1], mask):
                output = self.section.run(forward_arguments(model, batch))[0]
        found = answer_log_probabilities(output, data, repeated, self.head)
        return found if n_groups is None else found.view(n_groups, len(rows), 2)


def batches(subject: Subject, steps: int, batch_size: int) -> Iterator[list[list[int]]]:
    """The examples of each of some steps, in the order of `fit`, apart by their kind."""
    settings = FitSettings(steps=steps, batch_size=batch_size, seed=subject.seed)
    for step in range(steps):
        yield subject.data.by_kind(settings.rows(len(subject.data), step))
