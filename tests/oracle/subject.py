"""One architecture under test: its tiny model, its oracle, and how closely the two are compared."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .anatomy import anatomy_of
from .oracle import Factors, Oracle, call
from .tiny import tiny_model

#: Two rows of equal length, longer than the sliding windows; ids of special tokens are left out.
IDS = torch.tensor([[5, 9, 12, 7, 30, 22, 8, 11, 44, 17], [8, 15, 41, 13, 19, 50, 20, 21, 6, 33]])
#: Of differing lengths, so that batches are padded.
PROMPTS = [[5, 9, 12, 7, 30, 22], [8, 15, 41, 13], [4, 6, 10, 11, 13, 14, 22, 23, 24, 25, 26, 27]]


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

    def paths(self, site: str) -> list[dict[str, str]]:
        """The anatomy as arguments of `for_model`, the fewest first."""
        anatomy = self.oracle.anatomy
        one = {"head": "projection", "attn_out": "projection", "mlp_out": "mlp"}.get(site, "layers_path")
        known = {"layers_path": anatomy.layers, "projection": anatomy.projection}
        known["mlp"] = anatomy.mlp[0] if len(anatomy.mlp) == 1 else None
        given = {name: path for name, path in known.items() if path}
        tries = [{one}, {one, "layers_path"}, set(given)]
        found = [
            {name: path for name, path in given.items() if name in names} for names in tries if names <= set(given)
        ]
        return [paths for index, paths in enumerate(found) if paths not in found[:index]]

    def about_padding(self) -> str:
        """Whether the library itself says something else of a padded prompt."""
        ids, mask = padded(PROMPTS)
        with torch.no_grad(), contextlib.suppress(Exception):
            arguments: dict[str, Any] = {"attention_mask": mask}
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            found = self.model(ids, **arguments).logits[:, -1]
            alone = torch.stack([call(self.model, torch.tensor([prompt]))[0, -1] for prompt in PROMPTS])
            off = float((found - alone).abs().max() / alone.abs().max())
            return f" (the library's own logits under left padding are off by {off:.1g})" if off > 1e-4 else ""
        return " (the library fails under left padding)"

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


def randomise(intervention: Any, seed: int = 3, scale: float = 1.5) -> Any:
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
