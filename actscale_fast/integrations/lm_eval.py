"""EleutherAI's lm-evaluation-harness on a model with an intervention: the model type `actscale`.

From the shell, the harness's own command line with that type added:

    python -m actscale_fast.integrations.lm_eval run --model actscale \\
        --model_args pretrained=gpt2,intervention=scalars,strength=-1 --tasks hellaswag
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..interventions import Intervention, load_intervention
from ..models import patch
from ._library import require

require("lm-eval")

from lm_eval.api.registry import register_model  # noqa: E402 (only a supported version is imported)
from lm_eval.models.huggingface import HFLM  # noqa: E402


@register_model("actscale")
class SteeredLM(HFLM):  # type: ignore[misc]
    """The harness's `hf` model with an intervention on it.

    Args:
        pretrained: as the harness's `hf` model takes it: a name, a folder, or a model at hand.
        intervention: an intervention made for that model, or the folder that its `save_pretrained` wrote.
        strength: β.
        kwargs: of the harness's `hf` model: tokenizer, batch_size, dtype, device, …

    Raises:
        ValueError: an intervention of another model; or, when log-likelihoods are asked for, one whose positions count
            from the end of the prompt or single out generated tokens: the harness pads on the right without a mask,
            and hands over context and continuation as one text.

    Example:
        >>> lm = SteeredLM(model, scalars, strength=-1.0, tokenizer=tokenizer, batch_size=8)
        >>> lm_eval.simple_evaluate(lm, tasks=["hellaswag"])
        >>> lm.remove()
    """

    def __init__(
        self, pretrained: Any, intervention: Intervention | str | Path, strength: float = 1.0, **kwargs: Any
    ) -> None:
        if not math.isfinite(strength):
            raise ValueError(f"strength: got {strength}, expected a finite number")
        given = intervention if isinstance(intervention, Intervention) else load_intervention(intervention)
        super().__init__(pretrained, **kwargs)
        self._patch = patch(self.model, given, float(strength))

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for part in self._patch.intervention.singles:
            where = part.location
            if where.generated or min(where.positions or (0,)) < 0:
                listed = [*(where.positions or ()), *["generated"] * where.generated]
                raise ValueError(
                    f"intervention: got positions {listed}, but padding and prompt are not told apart in a"
                    " log-likelihood; expected every token, or positions from the first token on"
                )
        return super()._model_call(inps, *args, **kwargs)

    def remove(self) -> None:
        """Take the intervention off the model."""
        self._patch.remove()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
