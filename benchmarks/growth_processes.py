"""What a step of a fit costs in each of several processes: `python -m benchmarks.growth_processes [--out FILE]`.

CPU seconds (not the clock's) of one step, the largest of all processes, on a random model of Llama's family in gloo
processes on the CPU: whole copies of the model and FSDP2, whose processes share the prompts, and tensor parallelism,
whose processes share each layer. The slope of log(seconds) over log(processes) is −1 where nothing is done twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import actscale_fast as af
from actscale_fast.learning.distributed import process_group
from actscale_fast.learning.engine import Engine, FitRequest
from actscale_fast.learning.execution import Execution

from .growth import OBJECTIVE, slope
from .machine import environment
from .models import RandomPrompts, Shape, random_model

OUT = Path(__file__).parent / "results" / "scale" / "growth_processes.json"
SHAPE = Shape(4, 8, 64, 4096, torch.float32, kv_heads=4, inner=1408)
PROMPTS, TOKENS, PROCESSES = 16, 64, (1, 2, 4)


def _whole(folder: str) -> Any:
    return random_model(SHAPE, torch.device("cpu"))


def _tensor_parallel(folder: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=torch.distributed.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval().requires_grad_(False)


def _fully_sharded(folder: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = random_model(SHAPE, torch.device("cpu"))
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


ENGINES: dict[str, Callable[[str], Any]] = {
    "whole copies": _whole, "FSDP2": _fully_sharded, "tensor parallelism": _tensor_parallel,
}  # fmt: skip


def in_process(rank: int, size: int, folder: str) -> None:
    """One of the processes; the first one writes what all of them took."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store-{size}", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {}
    for name, load in ENGINES.items():
        seconds = seconds_of_step(_whole(folder) if size == 1 else load(folder))
        every: list[Any] = [None] * size
        torch.distributed.all_gather_object(every, seconds)
        found[name] = max(every)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def seconds_of_step(model: Any, repeats: int = 3) -> float:
    """CPU seconds of one step in this process, the median of some."""
    data = RandomPrompts(PROMPTS, TOKENS, SHAPE.vocab, torch.device("cpu"))
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.fill_(0.05)
    requests = [FitRequest(list(range(PROMPTS)), OBJECTIVE)]
    times = []
    with process_group(None, model) as processes, torch.enable_grad():
        options = Execution(recompute=False)
        with Engine(model, data, scalars, [OBJECTIVE], options, processes) as engine:
            for _ in range(repeats + 1):
                begun = time.process_time()
                engine.gradients(requests)
                times.append(time.process_time() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="file for the figures")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        _whole(folder).save_pretrained(folder)
        for size in PROCESSES:
            torch.multiprocessing.spawn(in_process, (size, folder), nprocs=size)  # type: ignore[no-untyped-call]
        found = [json.loads(Path(folder, f"{size}.json").read_text()) for size in PROCESSES]
    table = []
    for name in ENGINES:
        seconds = [one[name] for one in found]
        table.append({
            "engine": name, "processes": list(PROCESSES), "seconds in each": [round(value, 4) for value in seconds],
            "slope": round(slope(PROCESSES, seconds), 3),
        })  # fmt: skip
        print(table[-1])
    shape = {"layers": SHAPE.layers, "hidden size": SHAPE.heads * SHAPE.head_dim, "prompts": PROMPTS, "tokens": TOKENS}
    record = {"environment": environment(torch.device("cpu")), "model": shape, "growth": table}
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
