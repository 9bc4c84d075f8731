"""Unrelated behaviours, on which the side effects of an intervention are measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...interventions import Intervention
from ...tasks.examples import Example, prompt_of
from ...tasks.greater_than import greater_than
from ...tasks.indirect_objects import indirect_object_identification
from ...tasks.known_prompts import family_of
from ...tasks.loading import ExampleSource, examples_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Prompts of each built-in task that serve as unrelated behaviours.
_N_UNRELATED = 24
UNRELATED = {"indirect-object": indirect_object_identification, "greater-than": greater_than}


def behaviours_beside(
    given: Mapping[str, ExampleSource] | None, intervention: Intervention, examples: list[Example],
    tokenizer: PreTrainedTokenizerBase, task: str | None, seed: int, left_out: dict[str, str],
) -> dict[str, list[Example]]:  # fmt: skip
    """Examples of unrelated behaviours: the caller's, or those of built-in tasks that the examples do not belong to."""
    if given is not None:
        if not isinstance(given, Mapping):
            raise TypeError(f"unrelated: got {type(given).__name__}, expected a dict of examples by name")
        return {name: examples_from(some, f"unrelated {name!r}") for name, some in given.items()}
    own = {task, *(family_of(text) for text in map(_question, examples) if text is not None)}
    found = {}
    for name, make in UNRELATED.items():
        if name in own:
            continue
        if any(part.needs_source and not part.source_is_prompt for part in intervention.singles):
            left_out[name] = "its prompts have no source for an interchange"
            continue
        try:
            found[name] = make(tokenizer, n_train=1, n_test=_N_UNRELATED, seed=seed).test
        except ValueError as error:
            left_out[name] = str(error)
    return found


def _question(example: Example) -> str | None:
    """The text of a prompt; of a chat the user's last message, if there is one."""
    prompt = prompt_of(example)
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), None)
