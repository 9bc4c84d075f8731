"""Every system on every task and seed: fitted, saved, and measured on training and held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interventions import ActivScalar, Intervention, load_intervention
from ..learning import attribution, evaluate_all, fit
from .measuring import by_attribution, figures, shuffled
from .systems import Size, System, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Number of prompts for the gradient of the attribution baseline.
_ATTRIBUTED = 64


class Laboratory:
    """A model with its tokenizer, the size of the run, and the folder for learned interventions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size, folder: Path) -> None:
        self.model, self.tokenizer, self.size, self.folder = model, tokenizer, size, folder

    def kept(self, task: Task, system: System, seed: int) -> Path:
        """The folder of a learned intervention."""
        return self.folder / "interventions" / f"{task.name}-{system.name}-{seed}"

    def learned(self, task: Task, system: System, seed: int) -> Intervention:
        """A learned intervention, loaded from its folder."""
        return load_intervention(self.kept(task, system, seed))

    def measured(self, examples: Any, interventions: list[Intervention]) -> list[dict[str, Any]]:
        """The figures of several interventions on the same examples, for which the frozen model runs once."""
        found = evaluate_all(self.model, self.tokenizer, examples, interventions)
        return [figures(evaluation, one) for evaluation, one in zip(found, interventions, strict=True)]

    def compare(self, task: Task, system: System, seed: int) -> dict[str, Any]:
        """Fit one system (an interrupted fit resumes), save it, and measure it."""
        train, test = task.examples(self.tokenizer, self.size, seed, aligned=system.aligned)
        lengths = sorted({len(self.tokenizer(example.prompt)["input_ids"]) for example in (*train, *test)})
        intervention = system.make(self.model, lengths[0])
        result = fit(
            self.model, self.tokenizer, train, intervention, system.objective, lr=system.lr, seed=seed,
            steps=round(system.share * self.size.steps),
            checkpoint=self.folder / "work" / f"{task.name}-{system.name}-{seed}.safetensors", progress=False,
        )  # fmt: skip
        intervention.save_pretrained(self.kept(task, system, seed))
        return {
            "seconds": round(result.seconds, 1),
            "lengths": [lengths[0], lengths[-1]],
            "n_train": len(train),
            "train": self.measured(train[: self.size.n_test // 2], [intervention])[0],
            "test": self.measured(test, [intervention])[0],
        }

    def baselines(self, task: Task, system: System, seed: int) -> dict[str, Any]:
        """The figures of scalars that are not learned: the learned values at random heads, and the gradient at 0."""
        train, test = task.examples(self.tokenizer, self.size, seed, aligned=system.aligned)
        learned = self.learned(task, system, seed)
        assert isinstance(learned, ActivScalar)
        found = attribution(
            self.model, self.tokenizer, train[:_ATTRIBUTED], intervention=learned, knock_out=False, progress=False
        )
        random, gradient = self.measured(test, [shuffled(learned, seed), by_attribution(learned, found)])
        return {"random": random, "attribution": gradient}
