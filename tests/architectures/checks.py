"""The checks of one architecture: each site, generation with a cache, and the gradients of a fit."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import actscale_fast as af

from .anatomy import anatomy_of
from .objective import full_objective
from .oracle import Factors, Oracle, call
from .tiny import tiny_model

SITES = ("head", "attn_out", "mlp_out", "residual")
#: Two rows of equal length, longer than the sliding windows; ids of special tokens are left out.
IDS = torch.tensor([[5, 9, 12, 7, 30, 22, 8, 11, 44, 17], [8, 15, 41, 13, 19, 50, 20, 21, 6, 33]])
#: Prompts of a fit: of differing lengths, so that batches are padded.
PROMPTS = [[5, 9, 12, 7, 30, 22], [8, 15, 41, 13], [4, 6, 10, 11, 13, 14, 22, 23, 24, 25, 26, 27]]
RIGHT, REFUSED, CANNOT_ACT, WRONG, CRASH, UNCHECKED = "right", "refused", "cannot act", "WRONG", "CRASH", "unchecked"
_NAMED = (ValueError, TypeError, RuntimeError, NotImplementedError)


@dataclass
class Verdict:
    """What came of one check."""

    verdict: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}" if self.detail else self.verdict


@dataclass
class Row:
    """All verdicts of one architecture."""

    model_type: str
    name: str
    made: str = ""  # why it could not be made, or nothing
    dtype: str = ""
    sites: dict[str, Verdict] = field(default_factory=dict)
    generate: Verdict = field(default_factory=lambda: Verdict(""))
    fit: Verdict = field(default_factory=lambda: Verdict(""))

    @property
    def verdicts(self) -> list[Verdict]:
        return [*self.sites.values(), self.generate, self.fit]


class Subject:
    """A tiny model, its oracle, and the precision that it can be compared in."""

    def __init__(self, model_type: str, name: str) -> None:
        self.model_type = model_type
        model = tiny_model(model_type, name).requires_grad_(False)
        try:
            wide = tiny_model(model_type, name).requires_grad_(False).double()
            with torch.no_grad():
                found, again = call(wide, IDS), call(wide, IDS)
            if found.dtype == torch.float64 and bool(torch.isfinite(found).all()) and torch.equal(found, again):
                model = wide
        except (RuntimeError, ValueError, TypeError):
            pass  # float32 it is: parts of the model insist on it
        self._take(model)

    def _take(self, model: Any) -> None:
        self.model = model
        self.dtype = next(model.parameters()).dtype
        self.oracle = Oracle(model, anatomy_of(self.model_type), IDS)
        with torch.no_grad():
            self.plain = call(model, IDS)
        if not bool(torch.isfinite(self.plain).all()):
            raise ValueError("the tiny model's own logits are not finite")

    def allow_padding(self) -> None:
        """Fall back to float32 where padding makes float64 NaN: softmaxes in float32 of scores in float64 do."""
        ids, mask = padded(PROMPTS)
        with torch.no_grad():
            logits = self.model(ids, attention_mask=mask).logits[:, -1]
        if not bool(torch.isfinite(logits).all()):
            self._take(self.model.float())

    @property
    def relative(self) -> float:
        return 1e-6 if self.dtype == torch.float64 else 1e-3

    def agrees(self, found: Tensor, expected: Tensor, plain: Tensor) -> tuple[bool, float]:
        """Whether the found effect is the expected one, and the error as a share of the effect."""
        if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
            return False, math.inf
        effect = float((expected - plain).abs().max())
        error = float((found.to(expected.dtype) - expected).abs().max())
        floor = 1e-4 * self.relative * float(plain.abs().max())
        return error <= self.relative * effect + floor, error / max(effect, 1e-30)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of prompts, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def attempt(action: Callable[[], Verdict]) -> Verdict:
    """The verdict, or what an exception makes of it."""
    try:
        return action()
    except _NAMED as error:
        text = " ".join(str(error).split())
        return Verdict(REFUSED if _raised_by_package(error) else CRASH, f"{type(error).__name__}: {text}"[:400])
    except Exception as error:  # every other class is an unnamed error by itself
        return Verdict(CRASH, f"{type(error).__name__}: {' '.join(str(error).split())}"[:400])


def _raised_by_package(error: BaseException) -> bool:
    """Whether the error was raised in the package's own code, not below it."""
    trace = error.__traceback__
    last = ""
    while trace is not None:
        last = trace.tb_frame.f_code.co_filename
        trace = trace.tb_next
    return "actscale_fast" in last


def randomise(intervention: Any, oracle: Oracle, seed: int = 3, scale: float = 0.6) -> Any:
    """Normally distributed scalars."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in intervention.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return intervention


def factors_of(
    intervention: Any, oracle: Oracle, strength: float | Tensor, slots: Sequence[int] | None = None
) -> Factors:
    """1 + β·α by layer, [T or 1, heads]; `slots` says which slot each token uses, −1 none."""
    found: Factors = {}
    for index, layer in enumerate(intervention.location.layers):
        alpha = intervention.alpha[index].double()  # [P, H]
        if intervention.location.site == "head":
            n_heads = oracle.heads[layer][0]
            if alpha.shape[-1] < n_heads:
                raise OracleError(f"layer {layer} has {n_heads} heads, the intervention has {alpha.shape[-1]}")
            alpha = alpha[:, :n_heads]
        if slots is not None:
            rows = [alpha[slot] if slot >= 0 else torch.zeros_like(alpha[0]) for slot in slots]
            alpha = torch.stack(rows)
        found[layer] = 1 + strength * alpha
    return found


class OracleError(AssertionError):
    """The package accepted what the oracle says is not there."""


def check_site(subject: Subject, site: str) -> Verdict:
    """An intervention on every layer that has the site, on every token."""
    model, oracle = subject.model, subject.oracle
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        intervention = randomise(af.ActivScalar.for_model(model, site=site), oracle)
        with torch.no_grad(), af.patch(model, intervention, strength=0.8):
            found = call(model, IDS)
    wanted = oracle.acts_at(site)
    if wanted is None:
        return Verdict(UNCHECKED, "accepted, and the oracle has no such site")
    extra = sorted(set(intervention.location.layers) - set(wanted))
    if extra:
        return Verdict(UNCHECKED, f"accepted at layers {extra}, where the oracle has no such site")
    try:
        factors = factors_of(intervention, oracle, 0.8)
    except OracleError as error:
        return Verdict(WRONG, str(error))
    with torch.no_grad():
        expected = oracle.logits(IDS, site, factors)
        positive = {
            layer: 0.5 + torch.linspace(0, 2, value.shape[1])[None].double() for layer, value in factors.items()
        }
        strong = oracle.logits(IDS, site, positive)
    right, error = subject.agrees(found, expected, subject.plain)
    if not right:
        return Verdict(WRONG, f"off by {error:.2g} of the effect")
    if float((expected - subject.plain).abs().max()) <= 1e-9 * float(subject.plain.abs().max()):
        return Verdict(CANNOT_ACT, "no scalar changes anything")
    reach = float((strong - subject.plain).abs().max()) / float(subject.plain.abs().max())
    missing = sorted(set(wanted) - set(intervention.location.layers))
    note = f"layers {missing} left out" if missing else ""
    if reach <= 1e-5:
        return Verdict(CANNOT_ACT, "right, but a norm follows: a positive factor does nothing")
    return Verdict(RIGHT, note)


def check_generate(subject: Subject, site: str) -> Verdict:
    """Generation with a cache, with positions and on generated tokens, against whole passes one prompt at a time."""
    model, oracle = subject.model, subject.oracle
    intervention = randomise(
        af.ActivScalar.for_model(model, site=site, positions=[0, -2], generated=True), oracle, seed=5
    )
    for padded in (True, False):
        prompts = PROMPTS if padded else [prompt[-4:] for prompt in PROMPTS]
        # The library itself first: not every family is the same with a cache, or with padding.
        plain = _off_by(subject, prompts, site, None)
        if plain is not None and plain <= 20 * subject.relative:
            found = _off_by(subject, prompts, site, intervention)
            kind = "padded" if padded else "unpadded"
            if found is None or found > 20 * subject.relative:
                return Verdict(WRONG, f"{kind}: logits off by {found:.2g}")
            return Verdict(RIGHT, "" if padded else "unpadded; the library differs under padding")
    return Verdict(UNCHECKED, "the library's cached generation differs from its whole passes")


def _off_by(subject: Subject, prompts: Sequence[Sequence[int]], site: str, intervention: Any) -> float | None:
    """The largest relative difference of the logits that generation made its choices from."""
    model, oracle = subject.model, subject.oracle
    ids, mask = padded(prompts)
    # Of its own errors only the library's, without a patch, make a case that cannot be compared.
    guard = contextlib.suppress(Exception) if intervention is None else contextlib.nullcontext()
    n_new, found = 4, None
    with guard, torch.no_grad():
        with contextlib.nullcontext() if intervention is None else af.patch(model, intervention):
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, num_beams=1,
                output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        worst = 0.0
        for row, prompt in enumerate(prompts):
            new = found.sequences[row, -n_new:].tolist()
            whole = [*prompt, *new[:-1]]
            if intervention is None:
                expected = call(model, torch.tensor([whole]))
            else:
                slots = [-1] * len(prompt) + [2] * (n_new - 1)
                slots[0], slots[len(prompt) - 2] = 0, 1
                expected = oracle.logits(torch.tensor([whole]), site, factors_of(intervention, oracle, 1.0, slots))
            for step in range(n_new):
                one, other = found.logits[step][row], expected[0, len(prompt) - 1 + step]
                difference = float((one.to(other.dtype) - other).abs().max()) / float(other.abs().max())
                worst = max(worst, difference)
        return worst
    return None


def check_fit(subject: Subject, site: str) -> Verdict:
    """Value and gradient of the engine against plain whole passes: scalars at 0 and away from it, at all layers and at
    the highest one, at all tokens and at the last one.
    """
    model, oracle = subject.model, subject.oracle
    objective = af.Objective(margin=3.0, faithfulness=0.7, minimality=0.0)
    public_fit(model, site, objective)
    layers = list(af.ActivScalar.for_model(model, site=site).location.layers)
    cases: list[dict[str, Any]] = [{}, {"layers": layers[-1:]}, {"positions": [-1]}]
    for arguments in cases:
        for scale in (0.0, 0.3):
            intervention = randomise(af.ActivScalar.for_model(model, site=site, **arguments), oracle, scale=scale)
            terms, gradient = engine_objective(model, intervention, objective)
            value, expected = full_objective(oracle, intervention, objective, PROMPTS)
            off = float((terms[:2].double() - value).abs().max()) / max(float(value.abs().max()), 1e-3)
            size = max(float(expected.abs().max()), 1e-2 * float(value.abs().max()))
            off = max(off, float((gradient.double() - expected).abs().max()) / size)
            limit = 2e-5 if subject.dtype == torch.float64 else 2e-3
            if not off <= limit:
                return Verdict(WRONG, f"{arguments or 'all layers'}, scalars of {scale}: off by {off:.2g}")
    return Verdict(RIGHT)


def public_fit(model: Any, site: str, objective: Any) -> None:
    """One update by the public call, which refuses what cannot be learned."""
    from .objective import EXAMPLES, tokenizer

    intervention = af.ActivScalar.for_model(model, site=site)
    af.fit(model, tokenizer(), EXAMPLES, intervention, objective, steps=1, batch_size=3, progress=False)


def engine_objective(model: Any, intervention: Any, objective: Any) -> tuple[Tensor, Tensor]:
    """Terms and the scalars' gradient from one step of the engine."""
    from actscale_fast.learning.engine import Engine, Share

    from .objective import Examples

    with Engine(model, Examples(PROMPTS), intervention, [objective]) as engine:
        terms, gradients = engine.gradients([Share(list(range(len(PROMPTS))), objective)])
    return terms[0], gradients[0]


def check(model_type: str, name: str) -> Row:
    """Every check of one architecture."""
    from .overrides import CANNOT_RUN

    row = Row(model_type, name)
    if model_type in CANNOT_RUN:
        row.made = CANNOT_RUN[model_type]
        return row
    try:
        subject = Subject(model_type, name)
    except Exception as error:  # whatever the reason, the row says it
        row.made = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
    row.dtype = str(subject.dtype).removeprefix("torch.")
    for site in SITES:
        row.sites[site] = attempt(lambda site=site: check_site(subject, site))  # type: ignore[misc]
    usable = [site for site in SITES if row.sites[site].verdict == RIGHT]
    if usable:
        with contextlib.suppress(Exception):  # where padding cannot be tried, the checks say so themselves
            subject.allow_padding()
        row.generate = attempt(lambda: check_generate(subject, usable[0]))
        row.fit = attempt(lambda: check_fit(subject, usable[0]))
    return row
