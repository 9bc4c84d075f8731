"""Generation with a cache, with positions and on generated tokens, against whole passes of one prompt at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import actscale_fast as af

from .oracle import call
from .subject import PROMPTS, Subject, factors_of, padded, randomise
from .verdicts import RIGHT, UNCHECKED, WRONG, Verdict

N_NEW = 4  # tokens that are generated


def check_generate(subject: Subject, site: str, paths: dict[str, str]) -> Verdict:
    """Generation with a cache, with positions and on generated tokens, against whole passes one prompt at a time."""
    intervention = randomise(
        af.ActivScalar.for_model(subject.model, site=site, positions=[0, -2], generated=True, **paths),
        seed=5,
        scale=0.6,
    )
    differs = ""
    for is_padded in (True, False):
        prompts = PROMPTS if is_padded else [prompt[-4:] for prompt in PROMPTS]
        # The library itself first: not every family is the same with a cache, or with padding.
        plain = _off_by(subject, prompts, site, None)
        if plain is not None and plain <= 20 * subject.relative:
            found = _off_by(subject, prompts, site, intervention)
            kind = "with padding" if is_padded else "without padding"
            if found is None or found > 20 * subject.relative:
                return Verdict(WRONG, f"{kind}: logits off by {found:.2g}, the library's own by {plain:.1g}")
            return Verdict(RIGHT, "" if is_padded else f"without padding; with it {differs}")
        differs = "the library fails" if plain is None else f"the library's own logits are off by {plain:.1g}"
    if plain is None:
        return Verdict(UNCHECKED, f"cached generation without an intervention: {differs}")
    found = max(_off_cached(subject, prompt, site, intervention) for prompt in PROMPTS)
    if found > 20 * subject.relative:
        return Verdict(WRONG, f"against the library's own cached passes: logits off by {found:.2g}")
    return Verdict(RIGHT, f"against cached passes; without a cache {differs}")


def _off_cached(subject: Subject, prompt: Sequence[int], site: str, intervention: Any) -> float:
    """The difference from generation with the same cache under the oracle's factors, pass by pass."""
    model, oracle = subject.model, subject.oracle
    slots = [-1] * len(prompt)
    slots[0], slots[len(prompt) - 2] = 0, 1
    now = factors_of(intervention, oracle, 1.0, slots)
    passes = 0

    def next_pass(*_: Any) -> None:
        nonlocal passes
        if passes:
            now.update(factors_of(intervention, oracle, 1.0, [2]))
        passes += 1

    with torch.no_grad():
        with af.patch(model, intervention):
            found = _generate(model, torch.tensor([prompt]))
        with oracle.scaled(site, now):
            handle = model.register_forward_pre_hook(next_pass)
            try:
                expected = _generate(model, torch.tensor([prompt]))
            finally:
                handle.remove()
    pairs = list(zip(found.logits, expected.logits, strict=True))
    return max(float((one - other).abs().max()) / float(other.abs().max()) for one, other in pairs)


def _generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    """Four greedy tokens with a cache, and the logits that they were chosen from."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=N_NEW, min_new_tokens=N_NEW,
        do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip


def _off_by(subject: Subject, prompts: Sequence[Sequence[int]], site: str, intervention: Any) -> float | None:
    """The largest relative difference of the logits that generation made its choices from."""
    model, oracle = subject.model, subject.oracle
    ids, mask = padded(prompts)
    # Of its own errors only the library's, without a patch, make a case that cannot be compared.
    guard = contextlib.suppress(Exception) if intervention is None else contextlib.nullcontext()
    with guard, torch.no_grad():
        with contextlib.nullcontext() if intervention is None else af.patch(model, intervention):
            found = _generate(model, ids, mask)
        worst = 0.0
        for row, prompt in enumerate(prompts):
            new = found.sequences[row, -N_NEW:].tolist()
            whole = [*prompt, *new[:-1]]
            if intervention is None:
                expected = call(model, torch.tensor([whole]))
            else:
                slots = [-1] * len(prompt) + [2] * (N_NEW - 1)
                slots[0], slots[len(prompt) - 2] = 0, 1
                expected = oracle.logits(torch.tensor([whole]), site, factors_of(intervention, oracle, 1.0, slots))
            for step in range(N_NEW):
                one, other = found.logits[step][row], expected[0, len(prompt) - 1 + step]
                difference = float((one.to(other.dtype) - other).abs().max()) / float(other.abs().max())
                worst = max(worst, difference)
        return worst
    return None  # type: ignore[unreachable] # the guard may have suppressed an error
