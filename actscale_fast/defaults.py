"""Defaults that the library, the command line and the demo share; importing them does not import torch.

They were chosen for SmolLM2-135M-Instruct on country-capital conflicts and are a starting point for other models.
"""

from typing import Final

# The objective.
MARGIN: Final = 4.0
FAITHFULNESS: Final = 0.8
MINIMALITY: Final = 0.12

# The fit.
STEPS: Final = 45
LR: Final = 0.05
# For vectors and probes, where many numbers move one activation.
VECTOR_LR: Final = 0.01
VECTOR_MINIMALITY: Final = 0.02
BATCH_SIZE: Final = 16
SEED: Final = 0
SCHEDULE: Final = "cosine"
ACCUMULATE: Final = 1
CHECKPOINT_EVERY: Final = 10
PATIENCE: Final = 5
