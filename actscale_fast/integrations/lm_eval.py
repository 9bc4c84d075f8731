"""EleutherAI's lm-evaluation-harness: the model type `actscale`, a model with an intervention.

This module runs the harness's own command line with that type:

    python -m actscale_fast.integrations.lm_eval run --model actscale \\
        --model_args pretrained=gpt2,intervention=scalars,strength=-1 --tasks hellaswag
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..interventions import Intervention, load_intervention
from ..learning.stress.harness import harness_accuracies
from ..patching.edits import one_strength
from ..patching.patch import patch
from ._library import require

require("lm-eval")

from lm_eval.api.registry import register_model  # noqa: E402 (only a supported version is imported)
from lm_eval.models.huggingface import HFLM  # noqa: E402


@register_model("actscale")
class SteeredLM(HFLM):  # type: ignore[misc]
    """The harness's `hf` model with an intervention on it.

    Args:
        pretrained: a name, a folder, or a model, as for the harness's `hf` model.
        intervention: an intervention made for that model, or the folder that its `save_pretrained` wrote.
        strength: β.
        kwargs: arguments of the harness's `hf` model: tokenizer, batch_size, dtype, device, …

    Raises:
        ValueError: an intervention made for another model. Log-likelihood requests also raise it for an intervention
            with positions, because the harness passes context and continuation as one text, padded on the right without
            a mask. In generation tasks positions work as usual.

    Example:
        >>> lm = SteeredLM(model, scalars, strength=-1.0, tokenizer=tokenizer, batch_size=8)
        >>> lm_eval.simple_evaluate(lm, tasks=["hellaswag"])
        >>> lm.remove()
    """

    def __init__(
        self, pretrained: Any, intervention: Intervention | str | Path, strength: float = 1.0, **kwargs: Any
    ) -> None:
        strength = one_strength(strength, "one number")  # before the model is loaded
        given = intervention if isinstance(intervention, Intervention) else load_intervention(intervention)
        super().__init__(pretrained, **kwargs)
        self._patch = patch(self.model, given, strength)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for part in self._patch.intervention.singles:
            if part.location.positions is not None:
                raise ValueError(
                    f"intervention: got positions {list(part.location.positions)}, but a log-likelihood's context,"
                    " continuation and padding come as one text; expected an intervention on every token"
                )
        return super()._model_call(inps, *args, **kwargs)

    def remove(self) -> None:
        """Remove the intervention from the model."""
        self._patch.remove()


def accuracies(
    model: Any,
    tokenizer: Any,
    intervention: Intervention,
    tasks: Sequence[Any],
    *,
    strengths: Sequence[float] = (1.0, -1.0),
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, tuple[float, float]]:
    """Run tasks of the harness without and with an intervention, for the utility gate of `af.stress`.

    Args:
        model, tokenizer: a Hugging Face causal language model and its tokenizer.
        intervention: an intervention on every token.
        tasks: names of tasks, or their configurations as dicts.
        strengths: β, one run for each; the lowest accuracy counts.
        include_path: folder of YAML files of own tasks, such as those over local files; the harness's own tasks are
            then not looked up.
        limit: the largest number of samples of each task.
        batch_size: requests in one forward pass.
        options: further arguments of `lm_eval.simple_evaluate`, such as num_fewshot.

    Returns:
        (accuracy of the frozen model, lowest accuracy under the intervention) by task.

    Raises:
        ValueError: a task without an accuracy, or an intervention with positions.

    Example:
        >>> measured = accuracies(model, tokenizer, scalars, ["questions"], include_path="tasks")
        >>> print(af.stress(model, tokenizer, scalars, test, accuracies=measured))
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    local = include_path is not None or all(isinstance(task, dict) for task in tasks)
    manager = TaskManager(include_path=None if include_path is None else str(include_path), include_defaults=not local)
    common = {"tasks": list(tasks), "limit": limit, "bootstrap_iters": 0, "task_manager": manager} | options
    of_model = {"tokenizer": tokenizer, "batch_size": batch_size, "device": str(model.device)}
    frozen = lm_eval.simple_evaluate(HFLM(model, **of_model), **common)
    steered = []
    for strength in strengths:
        lm = SteeredLM(model, intervention, strength=strength, **of_model)
        try:
            steered.append(lm_eval.simple_evaluate(lm, **common))
        finally:
            lm.remove()
    return harness_accuracies(frozen, *steered)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
