"""A sweep whose points are divided between tasks of Ray: `python examples/sweep_with_ray.py FOLDER [SHARES]`."""

from __future__ import annotations

import sys

import ray

import actscale_fast as af

GRID = {"minimality": ["50%", "20%"], "seed": [0, 1]}


@ray.remote(num_cpus=1, max_retries=5)
def job(folder: str, share: str) -> int:
    """Fit one share; a task that is lost is started again and goes on from its checkpoints."""
    model, tokenizer = af.load_demo_model()
    train, test = af.tasks.country_capital_conflicts(tokenizer, n_train=16, n_test=8)
    layers = af.ActivScalar.for_model(model, layers=[20, 25])
    result = af.sweep(
        model, tokenizer, train, GRID, intervention=layers, steps=2, batch_size=8, warm_start=True, at_once=1,
        evaluate_on=test, folder=folder, points=share, progress=False,
    )  # fmt: skip
    return len(result.fits)


def main(folder: str, shares: str = "2") -> None:
    """Run all shares, then gather the folder."""
    ray.init(include_dashboard=False)
    n = int(shares)
    print(ray.get([job.remote(folder, f"{number}/{n}") for number in range(1, n + 1)]))
    print(af.gather_sweep(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
