"""Opening a frozen model for partial runs: its head read, its products by oneDNN, gates at its layers.

Each of these shortcuts is compared with the whole model, once per model, on one short prompt. Where one disagrees the
whole model runs in its place, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.hugging_face import embedding_weight, input_device
from ..architectures.layout import ModelLayout
from ..architectures.lm_head import OutputHead, read_head
from ..architectures.site_check import skipped
from ..modules.hooks import suspended
from ..modules.without_side_effects import lock, unhooked
from .batching import Batch, forward_arguments, note_padding, padding_known
from .onednn import fast_products
from .partial_forward import PartialForward

#: How far a shortcut may be off the whole model, relative to the norm of its last hidden states.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_PROBE = (7, 11, 5, 13, 23, 3, 17, 29, 19, 2, 31, 37)
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Shortcuts]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shortcuts:
    """Which of them agree with the whole model."""

    products: bool  # matrix products of frozen layers by oneDNN
    partial: bool  # layers below the first that runs, and those after the last, left out


@contextlib.contextmanager
def open_frozen_model(
    found: ModelLayout, call: nn.Module, arguments: dict[str, Any], *, shortcuts: bool = True
) -> Iterator[tuple[OutputHead | None, PartialForward]]:
    """The head and an open section of a model that is frozen already; the model is as it was afterwards.

    Args:
        found: the model's layout.
        call: what a run calls: the model, or its compiled wrapper, which brings products of its own.
        arguments: of a forward pass on a prompt or two, which the head is read from.
        shortcuts: False: nothing is left out, and no product is exchanged.
    """
    head = read_head(found.model, arguments) if shortcuts else None
    trusted = _trusted(found, head) if shortcuts else Shortcuts(False, False)
    with contextlib.ExitStack() as stack:
        if call is found.model and trusted.products:
            stack.enter_context(fast_products(found.layers))
        module = None if head is None else head.module
        yield head, stack.enter_context(PartialForward(found, module, call, partial=trusted.partial))


@torch.no_grad()
def _trusted(found: ModelLayout, head: OutputHead | None) -> Shortcuts:
    """The shortcuts that agree with the whole model, from the model or as it is known."""
    if skipped():
        note_padding(found.model, True)
        return Shortcuts(True, True)
    device = next((p.device for p in found.model.parameters() if not p.is_meta), torch.device("cpu"))
    config: Any = found.model.config
    known = _known.setdefault(found.model, {})
    key = (found.layers_path, head is not None, device, str(getattr(config, "_attn_implementation", "")))
    if key not in known:
        verdict = _compared(found, head)
        if verdict is None:  # what is not a number cannot be compared
            return Shortcuts(True, True)
        known[key] = verdict
    elif padding_known(found.model) is None:
        note_padding(found.model, True)
    return known[key]


def _compared(found: ModelLayout, head: OutputHead | None) -> Shortcuts | None:
    device = input_device(found.model)
    ids = torch.tensor([_PROBE], device=device) % embedding_weight(found.model).shape[0]
    model: Any = found.model
    arguments = forward_arguments(model, Batch(ids, torch.ones_like(ids), padded=False))
    module, n_layers = None if head is None else head.module, found.n_layers
    eager = torch.compiler.set_stance("force_eager")
    with lock, eager, suspended(found.decoder), unhooked(model), PartialForward(found, module) as section:
        # From the top down, after a pass of other tokens: what a layer that is left out has kept must not be right.
        starts = sorted({1, n_layers // 2, n_layers - 1} & set(range(1, n_layers)), reverse=True)
        whole, hidden = section.run(arguments, wanted=starts)
        if not bool(whole.isfinite().all()):
            note_padding(model, True)
            return None
        others = ids.flip(1)[:, 1:].repeat(2, 1)
        section.run(forward_arguments(model, Batch(others, torch.ones_like(others), padded=False)))
        partial = all(_agrees(section, whole, arguments, first=start, hidden=hidden[start]) for start in starts)
        partial = partial and all(_agrees(section, hidden[start], arguments, end=start) for start in starts[:1])
        with fast_products(found.layers) as count:
            products = not count or _agrees(section, whole, arguments)
        note_padding(found.model, _pads(model, section, ids, whole))
    names = [
        name for name, right in (("oneDNN's products", products), ("running some layers only", partial)) if not right
    ]
    if names:
        warnings.warn(
            f"{type(found.model).__name__}: {' and '.join(names)} did not give what the whole model gives; the whole "
            "model runs instead, which takes longer",
            stacklevel=4,
        )
    return Shortcuts(products, partial)


def _pads(model: Any, section: PartialForward, ids: Tensor, whole: Tensor) -> bool:
    """Whether padding on the left, masked out, leaves a prompt as it is by itself."""
    padded = torch.cat([ids[:, -1:], ids[:, -1:], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    try:
        note_padding(model, True)  # so that the arguments can be made
        return _agrees(section, whole, forward_arguments(model, Batch(padded, mask, padded=True)))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _agrees(section: PartialForward, whole: Tensor, arguments: dict[str, Any], **options: Any) -> bool:
    try:
        return _close(section.run(arguments, **options)[0], whole)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # layers that exchange more than hidden states
        return False


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    off = (found.double() - expected.double()).norm()
    return bool(off <= _TOLERANCE.get(expected.dtype, 0.1) * expected.double().norm())
