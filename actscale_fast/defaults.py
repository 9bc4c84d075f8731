"""Defaults that the library, the command line and the demo share; importing them does not import torch.

Rates and weights of the ℓ1 norm are shares of a scale that `fit` measures, so that they mean the same on models whose
activations or logits have other sizes. They were chosen on SmolLM2-135M-Instruct; docs/evidence.md has figures on Gemma
3 270M.
"""

from typing import Final

# The objective.
MARGIN: Final = 4.0
FAITHFULNESS: Final = 0.8
# Shares of λ_max: for scalars, and for vectors and probes, where many numbers move one activation.
MINIMALITY: Final = "5%"
VECTOR_MINIMALITY: Final = "0.3%"
# Numbers where there is no λ_max: with sparsity="scalars", and for projections.
NUMBER_MINIMALITY: Final = 0.12

# The fit.
STEPS: Final = 45
# A share of the activation's size per step.
LR: Final = "5%"
BATCH_SIZE: Final = 16
SEED: Final = 0
SCHEDULE: Final = "cosine"
ACCUMULATE: Final = 1
CHECKPOINT_EVERY: Final = 10
PATIENCE: Final = 5
