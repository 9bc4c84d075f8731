"""How the cost of a fit's step grows: `python -m benchmarks.growth [--out FILE]`.

CPU seconds (not the clock's) of one step of an engine on a small random model, in one run: for more prompts, longer
prompts, more layers, and more fits of a sweep at once; and of one step of a fit with recomputation beside one without.
The slope of log(seconds) over log(size) is 1 where the cost is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import actscale_fast as af
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.execution import Execution

from .machine import environment
from .models import RandomPrompts, Shape, random_model

OUT = Path(__file__).parent / "results" / "scale" / "growth.json"
SHAPE = Shape(4, 2, 64, 1024, torch.float32, kv_heads=2, inner=352)
PROMPTS, TOKENS = 8, 32
SIZES: dict[str, Sequence[int]] = {
    "prompts": (8, 16, 32, 64), "tokens": (32, 128, 512), "layers": (4, 8, 16), "fits": (1, 2, 4, 8),
}  # fmt: skip
OBJECTIVE = af.Objective()


def seconds_of_step(
    shape: Shape = SHAPE, prompts: int = PROMPTS, tokens: int = TOKENS, fits: int = 1, repeats: int = 3,
    recompute: bool = False,
) -> float:  # fmt: skip
    """CPU seconds of one step, the median of some."""
    device = torch.device("cpu")
    model = random_model(shape, device)
    data = RandomPrompts(prompts, tokens, shape.vocab, device)
    scalars: Any = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.uniform_(-0.1, 0.1)
    if fits > 1:
        scalars = af.stack([scalars] * fits)
    rows = list(range(prompts))
    requests = [FitRequest(rows, OBJECTIVE, group) for group in range(fits)]
    times = []
    with torch.enable_grad(), Engine(model, data, scalars, [OBJECTIVE], Execution(recompute=recompute)) as engine:
        for _ in range(repeats + 1):
            begun = time.process_time()
            engine.gradients(requests)
            times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of log(seconds) over log(size), by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean = statistics.fmean(x)
    above = sum((one - mean) * other for one, other in zip(x, y, strict=True))
    return above / sum((one - mean) ** 2 for one in x)


def predicted(name: str, size: int) -> float:
    """The cost that the number of operations predicts: linear, but for attention, which adds tokens/(6·hidden size)."""
    tokens = size if name == "tokens" else TOKENS
    return (1 if name == "tokens" else size) * tokens * (1 + tokens / (6 * SHAPE.heads * SHAPE.head_dim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="file for the figures")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    measure: dict[str, Callable[[int], float]] = {
        "prompts": lambda size: seconds_of_step(prompts=size),
        "tokens": lambda size: seconds_of_step(tokens=size),
        "layers": lambda size: seconds_of_step(replace(SHAPE, layers=size)),
        "fits": lambda size: seconds_of_step(fits=size),
    }
    table = []
    for name, sizes in SIZES.items():
        seconds = [measure[name](size) for size in sizes]
        expected = [predicted(name, size) for size in sizes]
        table.append({
            "grows": name, "sizes": list(sizes), "seconds": [round(value, 4) for value in seconds],
            "slope": round(slope(sizes, seconds), 3), "predicted slope": round(slope(sizes, expected), 3),
        })  # fmt: skip
        print(table[-1], flush=True)
    plain, again = (seconds_of_step(tokens=512, prompts=4, recompute=one) for one in (False, True))
    record = {
        "environment": environment(torch.device("cpu")), "hidden size": SHAPE.heads * SHAPE.head_dim,
        "growth": table, "recomputed over plain": round(again / plain, 3),
    }  # fmt: skip
    print(record["recomputed over plain"])
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
