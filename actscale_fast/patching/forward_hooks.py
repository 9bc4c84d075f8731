"""The hooks around each forward pass of a patched model: they make the contexts that the edits read.

The decoder, the module that owns the layers, sees rows, padding and KV cache in its arguments, whoever calls it. A hook
before it gives every patch one `Context` per pass; a hook after it checks that every edit has run.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..architectures.arguments import named
from ..modules import hooks
from ..modules.module_paths import ModulePaths
from .announced_prompt import refuse_unannounced
from .checkpointing import CheckpointWithContexts
from .forward_call import read_call
from .forward_context import ActivePatch, Context, ModelPatches, uses_are_counted
from .generation import WrappedGenerate


def join(decoder: nn.Module, model: nn.Module, patch: ActivePatch) -> ModelPatches:
    """Add a patch to a model; the first one hooks the decoder and wraps generate()."""
    patches: ModelPatches | None = hooks.record_of(decoder)
    if patches is None:
        patches = ModelPatches(decoder)
        patches.handles["before"] = decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        patches.handles["after"] = decoder.register_forward_hook(_after_decoder, always_call=True)
        hooks.mark(decoder, patches)
    if model is not decoder and hooks.record_of(model) is None:
        path = next(name for name, module in model.named_modules() if module is decoder)
        generate = WrappedGenerate(model, patches, ModulePaths(model, [path]))
        generate.handles["before"] = model.register_forward_pre_hook(_before_model, with_kwargs=True)
        generate.handles["after"] = model.register_forward_hook(_after_model, always_call=True)
        hooks.mark(model, generate)
    patches.patches += (patch,)
    return patches


def leave(decoder: nn.Module, model: nn.Module | None, patch: ActivePatch) -> None:
    """Take a patch off a model; with the last one, decoder and model are as they were."""
    patches: ModelPatches | None = hooks.record_of(decoder)
    if patches is not None:
        patches.patches = tuple(other for other in patches.patches if other is not patch)
        patches.pending = [(other, check) for other, check in patches.pending if other is not patch]
        if patches.patches:
            return
        hooks.unmark(decoder)
    if model is not None and model is not decoder and hooks.record_of(model) is not None:
        hooks.unmark(model)


def _before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    generate: WrappedGenerate = hooks.record_of(model)
    generate.decoder_path.check()
    generate.model_patches.model_arguments = named(generate.names, args, kwargs)


def _after_model(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hooks.record_of(model).model_patches.model_arguments = None


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    patches: ModelPatches = hooks.record_of(decoder)
    if patches.suspended:
        for patch in patches.patches:
            patch.context = Context(None, 0.0)
        return
    compiling = torch.compiler.is_compiling()
    while patches.pending:
        if compiling:
            raise RuntimeError("patch: the model has not been checked yet; run a forward pass before it is compiled")
        patches.pending[-1][1]()
        patches.pending.pop()  # only now: a check that fails must fail again in the next pass
    call = read_call(patches.names, args, kwargs)
    call = replace(call, model_arguments=patches.model_arguments, makes_cache=_makes_cache(decoder, kwargs))
    if any(patch.reads_positions for patch in patches.patches):
        call.refuse_unknown_arguments()
        if patches.announced is None and not compiling:
            refuse_unannounced(call)
    if patches.announced is not None and any(patch.reads_arguments for patch in patches.patches):
        call = replace(call, prompt=patches.announced.prompt_of(call))
    if not compiling:
        own = threading.get_ident()
        if patches.thread not in (None, own):
            raise RuntimeError(
                "patch: another forward pass of this model is running in another thread; run one at a time"
            )
        patches.thread = own
    for patch in patches.patches:
        if patch.module_paths is not None:
            patch.module_paths.check()
        patch.context = patch.context_of(call)
        if patch.context is not None:
            patch.context.n_last = _n_last(patches.model_arguments)
    if decoder.training and torch.is_grad_enabled() and not compiling:
        for patch in patches.patches:
            for layer in patch.checkpointed_layers():
                CheckpointWithContexts.install(layer, patches)


def _after_decoder(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    patches: ModelPatches = hooks.record_of(decoder)
    contexts = [(patch.counted, patch.context) for patch in patches.patches]
    for patch in patches.patches:
        patch.context = None
    patches.thread = None
    if torch.compiler.is_compiling() or not uses_are_counted() or output is None or decoder.training:
        return  # uses were not counted, an error is on its way, or layers may be dropped
    if patches.leaves_out or patches.suspended:
        return
    for counted, context in contexts:
        if counted is None or context is None or context.placement is None or tuple(context.used) == counted:
            continue
        for layer in counted:
            count = context.used.count(layer)
            if count != 1:
                times = "did not run" if not count else f"ran {count} times"
                raise RuntimeError(
                    f"patch: the intervention at layer {layer} {times} in this forward pass, expected once: a module "
                    "is bypassed, fused, left out or used again"
                )


def _makes_cache(decoder: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder that is given no cache creates one."""
    wanted = kwargs.get("use_cache")
    return bool(getattr(getattr(decoder, "config", None), "use_cache", False) if wanted is None else wanted)


def _n_last(model_arguments: dict[str, Any] | None) -> int | None:
    kept = None if model_arguments is None else model_arguments.get("logits_to_keep")
    return kept if isinstance(kept, int) and kept > 0 else None
