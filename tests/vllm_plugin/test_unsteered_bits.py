"""A request without an intervention gets what vLLM computes without the plug-in, bit for bit.

In a file of its own, whose engines are the only ones that are open: on processors with AVX-512 an eager engine that
starts beside a compiled one rounds otherwise, in vLLM itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from engines import ask, log_probabilities, params, serving
from tiny_llama import TinyLlama

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (40, 17), (90, 33), (60, 70))]


def test_an_unsteered_request_beside_steered_ones_has_the_bits_of_vllm_without_the_plug_in(
    tiny: TinyLlama, folder: Path
) -> None:
    plain = [(prompt, params()) for prompt in PROMPTS]
    with serving(tiny, None) as stock:
        expected = [ask(stock, [one])[0] for one in plain]
        together = ask(stock, [*plain, *plain])
    with serving(tiny, folder) as engine:
        alone = [ask(engine, [one])[0] for one in plain]
        mixed = ask(engine, [*plain, *((prompt, params(actscale="a")) for prompt in PROMPTS)])
    for number in range(len(PROMPTS)):
        assert torch.equal(log_probabilities(alone[number]), log_probabilities(expected[number]))
        assert torch.equal(log_probabilities(mixed[number]), log_probabilities(together[number]))
        assert not torch.equal(log_probabilities(mixed[number]), log_probabilities(mixed[number + len(PROMPTS)]))
