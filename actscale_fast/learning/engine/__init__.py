"""One step of one fit or of many: the terms and their gradients, at the cost of what the interventions can change.

In the order of a step:

- `engine`: opens the model with the fastest strategy that agrees with the plain model, then takes steps, which a
  `step_runner` runs;
- `microbatches`: splits the prompts of the `FitRequest`s, by `batch_plan` (little padding, few passes), `packing`
  (several prompts per row, if `packing_check` allows it) and `token_budget` (memory);
- `collate`: makes the tensors of a microbatch, with constants from `reference_cache`;
- `forward_backward`: the losses and gradients of a microbatch, on a GPU optionally by `cuda_graphs`.

Once per engine: `active_region` finds what can change, and `gradient_check` compares two prompts with the
`plain_model`. `reference_cache` runs the frozen model when a prompt is first used and keeps what is constant in a
`row_store`.
`shared_layers` finds the layers that are the same for both directions; `recomputation` lets layers be computed again in
the backward pass, to save memory.
"""

from .active_region import ActiveRegion, active_region
from .batch_plan import PASS_COST_CPU, PASS_COST_GPU, PASS_TOKENS_CPU, even_size, plan
from .engine import Engine
from .gradient_check import GradientError, check_gradient
from .microbatches import FitRequest

__all__ = [
    "PASS_COST_CPU",
    "PASS_COST_GPU",
    "PASS_TOKENS_CPU",
    "ActiveRegion",
    "Engine",
    "FitRequest",
    "GradientError",
    "active_region",
    "check_gradient",
    "even_size",
    "plan",
]
