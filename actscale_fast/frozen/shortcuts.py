"""Opening a frozen model for partial runs: its output head is read, and layers may be left out.

Partial runs are compared with the whole model, once per model, on one short prompt. Where they disagree, the whole
model runs instead, and a warning says so once.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.hugging_face import embedding_weight, input_device
from ..architectures.layout import ModelLayout
from ..architectures.lm_head import OutputHead, read_head
from ..architectures.sharding import model_processes
from ..architectures.site_check import skipped
from ..modules.hooks import suspended
from ..modules.without_side_effects import lock, unhooked
from .batching import Batch, forward_arguments, note_padding, padding_known
from .partial_forward import PartialForward

#: How far a shortcut may differ from the whole model, relative to the norm of the last hidden states.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_PROBE = (7, 11, 5, 13, 23, 3, 17, 29, 19, 2, 31, 37)
#: Whether partial runs of a model agree with the whole model.
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def open_frozen_model(
    found: ModelLayout, call: nn.Module, arguments: dict[str, Any], *, shortcuts: bool = True
) -> Iterator[tuple[OutputHead | None, PartialForward]]:
    """The output head and a partial forward of a model that is frozen already; the model is restored afterwards.

    Args:
        found: the model's layout.
        call: what a run calls: the model, or its compiled wrapper.
        arguments: the arguments of a forward pass on a prompt or two, in which the head is read.
        shortcuts: False: the head is not read, and no layer is left out.
    """
    head = read_head(found.model, arguments) if shortcuts else None
    partial = shortcuts and _may_run_in_part(found, head)
    with PartialForward(found, None if head is None else head.module, call, partial=partial) as partial_forward:
        yield head, partial_forward


@torch.no_grad()
def _may_run_in_part(found: ModelLayout, head: OutputHead | None) -> bool:
    """Whether partial runs agree with the whole model, compared now or earlier."""
    if skipped():
        note_padding(found.model, True)
        return True
    device = next((p.device for p in found.model.parameters() if not p.is_meta), torch.device("cpu"))
    config: Any = found.model.config
    known = _known.setdefault(found.model, {})
    key = (found.layers_path, head is not None, device, str(getattr(config, "_attn_implementation", "")))
    if key not in known:
        verdict = _agrees_in_part(found, head)
        if verdict is None:  # the logits are not finite, so they cannot be compared
            return True
        known[key] = verdict
    elif padding_known(found.model) is None:
        note_padding(found.model, True)
    return known[key]


def _agrees_in_part(found: ModelLayout, head: OutputHead | None) -> bool | None:
    device = input_device(found.model)
    ids = torch.tensor([_PROBE], device=device) % embedding_weight(found.model).shape[0]
    model: Any = found.model
    arguments = forward_arguments(model, Batch(ids, torch.ones_like(ids), padded=False))
    module, n_layers = None if head is None else head.module, found.n_layers
    eager = torch.compiler.set_stance("force_eager")
    with lock, eager, suspended(found.decoder), unhooked(model), PartialForward(found, module) as partial_forward:
        # Top down, and after a pass on other tokens: nothing that a left-out layer still holds may happen to be right.
        starts = sorted({1, n_layers // 2, n_layers - 1} & set(range(1, n_layers)), reverse=True)
        whole, hidden = partial_forward.run(arguments, wanted=starts)
        if not model_processes(model).leaders(bool(whole.isfinite().all())):
            note_padding(model, True)
            return None
        others = ids.flip(1)[:, 1:].repeat(2, 1)
        partial_forward.run(forward_arguments(model, Batch(others, torch.ones_like(others), padded=False)))
        partial = all(_agrees(partial_forward, whole, arguments, first=start, hidden=hidden[start]) for start in starts)
        partial = partial and all(_agrees(partial_forward, hidden[start], arguments, end=start) for start in starts[:1])
        note_padding(found.model, _honours_padding(model, partial_forward, ids, whole))
    if not partial:
        warnings.warn(
            f"{type(found.model).__name__}: running some layers only did not give what the whole model gives; the "
            "whole model runs instead, which takes longer",
            stacklevel=4,
        )
    return partial


def _honours_padding(model: Any, partial_forward: PartialForward, ids: Tensor, whole: Tensor) -> bool:
    """Whether a prompt that is padded on the left gives what it gives by itself."""
    padded = torch.cat([ids[:, -1:], ids[:, -1:], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    try:
        note_padding(model, True)  # so that the arguments can be made
        return _agrees(partial_forward, whole, forward_arguments(model, Batch(padded, mask, padded=True)))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _agrees(partial_forward: PartialForward, whole: Tensor, arguments: dict[str, Any], **options: Any) -> bool:
    try:
        agrees = _close(partial_forward.run(arguments, **options)[0], whole)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # layers may exchange more than hidden states
        agrees = False
    return model_processes(partial_forward.found.model).leaders(agrees)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    off = (found.double() - expected.double()).norm()
    return bool(off <= _TOLERANCE.get(expected.dtype, 0.1) * expected.double().norm())
