"""Predicted beside measured peak memory of steps of a fit: `python -m benchmarks.plan [--out FILE]`.

The prediction is that of `actscale_fast.plan_memory`, from the config alone. Measured are the weights and the most that
PyTorch's allocator holds beside them while an engine opens and takes a step, on random models of several shapes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import actscale_fast as af
from actscale_fast.learning.engine import PASS_TOKENS_CPU, Engine, FitRequest
from actscale_fast.learning.execution import Execution

from .machine import environment
from .memory import peak_bytes
from .models import RandomPrompts, Shape, random_model

OUT = Path(__file__).parent / "results" / "scale" / "plan.json"
#: Llama's shapes at sizes that a CPU computes in seconds.
SHAPES = {
    "6 layers of 256": Shape(6, 4, 64, 4096, torch.float32, kv_heads=2, inner=704),
    "8 layers of 384": Shape(8, 6, 64, 8192, torch.float32, kv_heads=6, inner=1024),
}
TOKENS = (256, 512)  # two prompts in a pass, or one
N_EXAMPLES = 4


def compared(shape: Shape, tokens: int, recompute: bool) -> dict[str, Any]:
    """One case: bytes predicted and measured."""
    device = torch.device("cpu")
    model = random_model(shape, device)
    data = RandomPrompts(N_EXAMPLES, tokens, shape.vocab, device)
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.uniform_(-0.1, 0.1)
    objective = af.Objective()

    def step() -> Any:
        execution = Execution(recompute=recompute)
        with torch.enable_grad(), Engine(model, data, scalars, [objective], execution) as engine:
            return engine.gradients([FitRequest([0, 1], objective)])

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    measured = weights + peak_bytes(step, device)
    plan = af.plan_memory(
        model.config, tokens, batch_size=2, accumulate=-(-4 * tokens // PASS_TOKENS_CPU),
        n_examples=N_EXAMPLES, dtype=shape.dtype,
    )  # fmt: skip
    predicted = plan.use(recompute).total
    return {
        "tokens": tokens, "recompute": recompute, "weights": weights, "measured": measured, "predicted": predicted,
        "ratio": round(predicted / measured, 3),
    }  # fmt: skip


def llama(layers: int, heads: int, inner: int) -> Any:
    """A config of Llama 3."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=heads * 128, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip


def predictions() -> list[dict[str, Any]]:
    """Llama 3 8B and 70B at 4096 tokens in bfloat16."""
    small, large = llama(32, 32, 14336), llama(80, 64, 28672)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("Llama 3 8B", small, {}),
        ("Llama 3 8B", small, {"fsdp": 4}),
        ("Llama 3 70B", large, {}),
        ("Llama 3 70B", large, {"tp": 8}),
        ("Llama 3 70B", large, {"fsdp": 8}),
    ]
    found = []
    for name, config, sharded in cases:
        plan = af.plan_memory(config, 4096, dtype="bfloat16", **sharded)
        found.append(replace(plan, model=name).to_dict())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="file for the figures")
    out = parser.parse_args().out
    af.ops.set_backend("auto")
    cases = []
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            for recompute in (False, True):
                cases.append({"shape": name} | compared(shape, tokens, recompute))
                print(cases[-1], flush=True)
    record = {"environment": environment(torch.device("cpu")), "cases": cases, "predictions": predictions()}
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
