"""EleutherAI's lm-evaluation-harness: the model type `actscale`, a model with an intervention.

This module runs the harness's own command line with that type:

    python -m actscale_fast.integrations.lm_eval run --model actscale \\
        --model_args pretrained=gpt2,intervention=scalars,strength=-1 --tasks hellaswag
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..interventions import Intervention, load_intervention
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


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
