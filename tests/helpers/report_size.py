"""The size of a report that a tiny model makes in seconds."""

from __future__ import annotations

from actscale_fast.reproduction import Size

TINY = Size(
    seeds=(0,), n_train=6, n_test=4, steps=6, n_path=2, path_steps=2, n_attributed=1, n_sentences=1, max_new_tokens=3,
    n_validation=2, batch_size=6, grid=((1, 1, 1), (1 / 3, 1, 1)), tuning_steps=1,
    methods=(("random",), ("activ-scalar",)), head_counts=(2,), head_strengths=(1.0,), head_steps=4, n_scored=4,
    n_transferred=2, transfer_seeds=1, n_generated=2, stressed=("few-scalars",), n_stressed=2, time_seeds=1,
    remedy_seeds=0,
)  # fmt: skip
