"""What all stages work with: the model, the size of the run, earlier results, and the learned interventions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extraction import continuations
from ..interventions import Intervention, load_intervention
from ..learning import Objective, fit
from ..patching.patch import patch
from ..tasks.examples import Example
from .measuring import measure
from .size import Size
from .systems import System
from .task_forms import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens that are generated to see whether a continuation begins with an answer.
_SAID = 6
#: A path of fits may take this factor more steps, where shorter ones leave too many scalars.
_MORE_STEPS = 8


class Laboratory:
    """A model with its tokenizer, the size of the run, the folder for learned interventions, and earlier results."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size, folder: Path) -> None:
        self.model, self.tokenizer, self.size, self.folder = model, tokenizer, size, folder
        self.results: dict[str, Any] = {}

    def kept(self, task: Task, system: System, seed: int, kind: str = "") -> Path:
        """The folder of a learned intervention."""
        return self.folder / "interventions" / f"{task.name}-{system.name}{kind}-{seed}"

    def learned(self, task: Task, system: System, seed: int) -> Intervention:
        """A learned intervention, loaded from its folder."""
        return load_intervention(self.kept(task, system, seed))

    def measured(self, examples: Any, interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
        """The records of several interventions on the same examples, for which the frozen model runs once."""
        return measure(self.model, self.tokenizer, examples, interventions)

    def new(self, task: Task, system: System, seed: int) -> Intervention:
        """An intervention to be fitted, with the positions of the seed's prompts."""
        first = task.examples(self.tokenizer, self.size, seed, aligned=system.aligned).train[0]
        return system.make(self.model, len(self.tokenizer(first.prompt)["input_ids"]))

    def settings(self, task: Task, system: System) -> dict[str, Any]:
        """The weights and the rate that validation prompts chose for a system."""
        chosen: dict[str, Any] = self.results["tuning"][task.name][system.tuned_as or system.name]["chosen"]
        return chosen

    def fitted(
        self, examples: Sequence[Example], intervention: Intervention, settings: dict[str, Any], seed: int, steps: int,
        *, n_active: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Fit an intervention in place, and return its number of steps and how long they took.

        Without a checkpoint: a resumed fit would not tell how long the whole of it takes, which equal time depends on.
        Where the fits of a path are too short to leave at most `n_active` scalars, it starts again with twice the
        steps; the result holds the steps and the time of the last attempt alone.
        """
        objective = Objective(faithfulness=settings["faithfulness"])
        if n_active is None:
            objective = replace(objective, minimality=settings["minimality"])
        most = _MORE_STEPS * steps
        while True:
            begun = self._clock()
            try:
                result = fit(
                    self.model, self.tokenizer, examples, intervention, objective, lr=settings["lr"], seed=seed,
                    steps=steps, batch_size=self.size.batch_size, n_active=n_active, progress=False,
                )  # fmt: skip
                break
            except ValueError as error:
                if not str(error).startswith("n_active: got") or steps >= most:
                    raise
                steps *= 2
        assert result.objective is not None
        seconds = round(self._clock() - begun, 2)
        return {"seconds": seconds, "steps": steps, "minimality": result.objective.minimality}

    def _clock(self) -> float:
        """Seconds of the processors on a CPU, whatever else runs on them; elsewhere seconds on the wall."""
        return time.process_time() if self.model.device.type == "cpu" else time.perf_counter()

    def said(self, examples: Sequence[Example], intervention: Intervention | None) -> dict[str, list[int]]:
        """Whether greedy generation begins with the answer that is steered to: 1 or 0 for each prompt.

        Args:
            examples: the prompts; the first `size.n_generated` of them are continued.
            intervention: applied with β = +1 and −1; None: the frozen model.
        """
        some = list(examples)[: self.size.n_generated]
        found = {}
        for name, strength in (("said_correct", 1.0), ("said_wrong", -1.0)):
            wanted = [example.correct if strength > 0 else example.wrong for example in some]
            found[name] = [
                int(text.strip().startswith(answer.strip()))
                for text, answer in zip(self._continued(some, intervention, strength), wanted, strict=True)
            ]
        return found

    def _continued(self, examples: Sequence[Example], intervention: Intervention | None, strength: float) -> list[str]:
        prompts = [example.prompt for example in examples]
        if intervention is None:
            return continuations(self.model, self.tokenizer, prompts, max_new_tokens=_SAID)
        with patch(self.model, intervention, strength=strength):
            return continuations(self.model, self.tokenizer, prompts, max_new_tokens=_SAID)
