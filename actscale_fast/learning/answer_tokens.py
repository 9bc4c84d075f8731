"""The tokens that answers add to their prompts."""

from __future__ import annotations

import warnings

from ..frozen.encoder import TextEncoder
from ..tasks.examples import Example, prompt_of

#: Marks that a space follows in most scripts that have spaces; after others, such as brackets, none is missing.
_BEFORE_SPACES = frozenset(".,:;?!")


class AnswerEncoder:
    """Turns the answers of examples into checked token ids.

    Args:
        encoder: encodes the prompts.
        n_tokens: number of tokens that the model can predict.
    """

    def __init__(self, encoder: TextEncoder, n_tokens: int) -> None:
        self.encoder, self.tokenizer, self.n_tokens = encoder, encoder.tokenizer, n_tokens
        self._missing: list[str] = []  # answers that seem to lack their leading space

    def encode(self, example: Example, prompt_ids: list[int]) -> tuple[list[int], list[int]]:
        """The token ids of the correct and of the wrong answer.

        Args:
            example: the example.
            prompt_ids: the token ids of its prompt.

        Raises:
            ValueError: an answer has no tokens or one that is unknown, or it begins with the other answer.
        """
        where = str(example.where)
        correct, wrong = (self._tokens(example, prompt_ids, name) for name in ("correct", "wrong"))
        if correct == wrong:
            tokens = "one token" if len(correct) == 1 else f"the same {len(correct)} tokens"
            raise ValueError(f"{where}: correct {example.correct!r} and wrong {example.wrong!r} are {tokens}")
        if correct[: len(wrong)] == wrong or wrong[: len(correct)] == correct:
            longer, shorter = ("correct", "wrong") if len(correct) > len(wrong) else ("wrong", "correct")
            raise ValueError(
                f"{where}: the tokens of {longer} {getattr(example, longer)!r} begin with all those of "
                f"{shorter} {getattr(example, shorter)!r}, whose probability is therefore never lower; expected "
                "answers of which neither begins with the other"
            )
        return correct, wrong

    def warn_of_missing_spaces(self) -> None:
        """Warn once if answers have several tokens only because their leading space is missing."""
        if self._missing:
            others = f" (and {len(self._missing) - 1} more answers)" if len(self._missing) > 1 else ""
            warnings.warn(self._missing[0] + others, stacklevel=4)

    def _tokens(self, example: Example, prompt_ids: list[int], name: str) -> list[int]:
        """The tokens that an answer adds to the prompt when the tokenizer splits both together."""
        answer, where = getattr(example, name), f"{example.where}, {name}"
        added = self._added(example, prompt_ids, answer, where)
        if not added:
            raise ValueError(f"{where}: {answer!r} adds no token to the prompt, expected at least one")
        if max(added) >= self.n_tokens:
            raise ValueError(f"{where}: token id {max(added)}, expected less than {self.n_tokens}")
        unknown, meant = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        single = len(added) == 1
        if unknown in added and not (answer.strip() == meant if single else meant in answer):
            what = "is not a token" if single else "has a part that is not a token"
            raise ValueError(f"{where}: {answer!r} {what} of the tokenizer (it reads {meant})")
        last = example.prompt[-1:]  # after a chat template's end no space is missing
        if not single and not answer[:1].isspace() and (last.isalnum() or last in _BEFORE_SPACES):
            spaced = " " + answer
            fewer = self._added(example, prompt_ids, spaced, where)
            if 0 < len(fewer) < len(added) and unknown not in fewer:
                tokens = self.tokenizer.convert_ids_to_tokens(added)
                self._missing.append(
                    f"{where}: {answer!r} is {len(added)} tokens {tokens} right after the prompt, and {spaced!r} is "
                    f"{len(fewer)}; did you mean it with its leading space?"
                )
        return added

    def _added(self, example: Example, prompt_ids: list[int], answer: str, where: str) -> list[int]:
        joined = self.encoder.opened(prompt_of(example), where, then=answer)
        if joined[: len(prompt_ids)] == prompt_ids:
            return joined[len(prompt_ids) :]
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])  # tokens merge across the boundary
