"""The memory of a step of a fit, without the model's weights: the passes run on PyTorch's meta device.

Tensors there have shapes and no values, so that a model of any size runs in seconds. A dispatch mode notes when each of
them is made and whether it is still held, also inside the backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..architectures.layout import ModelLayout, layout
from ..modules.hooks import first_of, replaced_forward, with_first

_META = torch.device("meta")
#: The name of the attention below among those of transformers.
_ATTENTION = "actscale_fast_memory"


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one pass, without weights."""

    kept: int  # after the forward pass, for the backward pass
    peak: int  # of both


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes that tensors hold which were made inside: now, and to 1% at most."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._at_most = 0  # bytes that may be held: those of tensors that have gone count until they are looked for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.live:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._at_most += storage.nbytes()
        if self._at_most > 1.01 * self.peak:  # looking after every operation would take far longer
            self.peak = max(self.peak, self.held())
        return found

    def held(self) -> int:
        """The bytes that are held now."""
        gone = [key for key, (reference, _) in self.live.items() if reference.expired()]
        for key in gone:
            del self.live[key]
        self._at_most = sum(n_bytes for _, n_bytes in self.live.values())
        return self._at_most


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and a number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Edit(torch.autograd.Function):
    """What an edit keeps: the activation that it scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, parameter)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, parameter = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(parameter)


def model_without_weights(config: Any, dtype: torch.dtype) -> nn.Module:
    """A frozen causal language model on the meta device.

    Raises:
        ValueError: transformers has no causal language model for this config, or makes none without values.
    """
    from transformers import AutoModelForCausalLM

    _register_attention()
    config = copy.deepcopy(config)  # which a model may share, and the attention is noted in it
    try:
        with _META:
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"model: {type(config).__name__} makes no causal language model here: {error}") from error
    return model.eval().requires_grad_(False)


def frozen_pass(model: nn.Module, n_rows: int, n_tokens: int) -> int:
    """The peak of a pass without gradients, in bytes."""
    with torch.no_grad(), _tracking(model) as tracker:
        _run(layout(model), n_rows, n_tokens)
    return tracker.peak


def step_pass(
    model: nn.Module, site: str, layers: Iterable[int], n_rows: int, n_tokens: int, *, recompute: bool
) -> PassMemory:
    """The memory of a forward and a backward pass in which some layers are steered.

    Args:
        model: as `model_without_weights` makes it.
        site, layers: where it is steered.
        n_rows: rows of the batch, one per prompt and direction.
        n_tokens: tokens of each.
        recompute: whether the backward pass computes each layer again.
    """
    found = layout(model)
    parameter = torch.zeros(1, device=_META, requires_grad=True)
    with contextlib.ExitStack() as stack:
        if recompute:
            for layer in found.layers:
                again = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(replaced_forward(layer, again))
        for number in layers:
            stack.callback(_steer(found.site_module(site, number), site, parameter).remove)
        tracker = stack.enter_context(_tracking(model))
        with torch.enable_grad():
            last = _run(found, n_rows, n_tokens)[:, -1]
            kept = tracker.held()
            torch.autograd.grad(last.float().square().sum(), [parameter])
    return PassMemory(kept, tracker.peak)


def _run(found: ModelLayout, n_rows: int, n_tokens: int) -> Tensor:
    """The decoder's last hidden states; a mask with four dimensions is taken as it is, so that no value is read."""
    decoder: Any = found.decoder
    ids = torch.zeros(n_rows, n_tokens, dtype=torch.int64, device=_META)
    mask = torch.ones(n_rows, 1, 1, 1, dtype=torch.bool, device=_META).expand(n_rows, 1, n_tokens, n_tokens)
    try:
        hidden: Tensor = decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        name = type(found.model).__name__
        raise ValueError(f"model: {name} cannot run without values, so its memory is not known: {reason}") from error
    return hidden


def _steer(module: nn.Module, site: str, parameter: Tensor) -> Any:
    """A hook that stands for the edit of a site."""
    if site == "head":
        return module.register_forward_pre_hook(lambda _, args: (_Edit.apply(args[0], parameter), *args[1:]))
    return module.register_forward_hook(
        lambda _, args, output: with_first(output, _Edit.apply(first_of(output), parameter))
    )


@contextlib.contextmanager
def _tracking(model: nn.Module) -> Iterator[MemoryTracker]:
    with MemoryTracker([*model.parameters(), *model.buffers()]) as tracker:
        yield tracker


@functools.cache
def _register_attention() -> None:
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any
    ) -> tuple[Tensor, None]:
        return _Attention.apply(query, key, value), None

    AttentionInterface.register(_ATTENTION, attend)
