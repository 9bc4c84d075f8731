"""A digest that identifies a model by samples of all its weights, however they are stored.

Each parameter and persistent buffer contributes its name, dtype, shape and the bytes of evenly spread elements.
Quantised weights contribute their packed values and their scales. Offloaded weights are read from where accelerate
keeps them. Of a weight that is sharded over processes each contributes the elements that it holds, so that the digest
is that of the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hugging_face import unwrap
from .sharding import is_dtensor, is_sharded, reshard, sampled, stored_as

_WHOLE = 1 << 14  # elements of a tensor that counts with all of them; norms, biases, scales
_SAMPLE = 384  # elements of a larger one; SmolLM2-135M: 272 tensors in 15 ms on one core
#: What wrappers put into the names of modules.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: Where bitsandbytes and hqq keep what belongs to packed values, beside the parameters or buffers of a module.
_STATE = ("absmax", "code", "offset", "state2", "scale", "zero", "SCB")


def weights_digest(model: nn.Module, *, collective: bool = False) -> str:
    """16 hexadecimal digits that identify a model by all its parameters and persistent buffers.

    Args:
        model: plain, quantised, offloaded or sharded, with or without the wrappers of torch.compile and PEFT.
        collective: whether all processes that hold a sharded model together make this call; otherwise such a model has
            no digest.

    Raises:
        ValueError: a weight cannot be read, for example because it is on the meta device or sharded; the message names
            it.
    """
    found = hashlib.sha256()
    if is_sharded(unwrap(model)):
        if not collective:
            raise ValueError("model: its weights are sharded over processes, and a single one was asked for its digest")
        reshard(unwrap(model))
    samples: list[Tensor] = []
    with torch.no_grad():
        for name, tensor in _tensors(unwrap(model)):
            for part, plain in _plain(name, tensor):
                found.update(f"{part} {plain.dtype} {tuple(plain.shape)}\n".encode())
                samples.append(_sample(part, plain))
        for values in _on_host(samples):
            found.update(values)
    return found.hexdigest()[:16]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All stored tensors of a model by name; a tensor used in two places appears once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for wrapper in _WRAPPERS:
            prefix = prefix.replace(wrapper, "")
        weights = _offloaded(module)
        lasting = [(name, value) for name, value in module._buffers.items() if name not in _transient(module)]
        for name, value in [*module._parameters.items(), *lasting]:
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            yield prefix + name, _readable(prefix + name, value, weights.get(name))
        for name, value in _beside(module):
            if id(value) not in seen:
                seen.add(id(value))
                yield prefix + name, value


def _transient(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _readable(name: str, tensor: Tensor, offloaded: Tensor | None) -> Tensor:
    """The tensor, or its offloaded copy if it is only a placeholder."""
    tensor = offloaded if tensor.is_meta and offloaded is not None else tensor
    if tensor.is_meta:
        raise ValueError(
            f"model: {name} is on the meta device, so this model cannot be told apart from others of the same shape; a "
            "checkpoint or sweep folder must record which model it belongs to: load the weights, or omit it"
        )
    if stored_as(tensor) == "partitioned":
        raise ValueError(
            f"model: {name} is partitioned by DeepSpeed's ZeRO-3 and cannot be read here; a checkpoint or sweep folder "
            "must record which model it belongs to: omit it, or load the model without ZeRO-3"
        )
    return tensor


def _offloaded(module: nn.Module) -> Mapping[str, Tensor]:
    """The weights that accelerate keeps in CPU memory or on disk and loads into the module for each pass."""
    hook: Any = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return _Lazily(weights)
    return {}


class _Lazily(dict[str, Tensor]):
    """Reads an offloaded weight on request; returns None for the others."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.weights = weights

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self.weights[name]
        except KeyError:
            return default


def _beside(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Scales of quantised weights that are not parameters or buffers, under names that no forward pass changes."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = module.__dict__.get("quant_state")
    yield from _of_state("weight.quant_state", state)
    scales = getattr(weight, "SCB", None)  # of int8; the first pass moves it from the weight to the module
    if scales is None:
        scales = getattr(module.__dict__.get("state"), "SCB", None)
    if isinstance(scales, Tensor):
        yield "weight.SCB", scales
    yield from _of_state("meta", module.__dict__.get("meta"))


def _of_state(name: str, state: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for key in _STATE if depth < 3 else ():
        value = state.get(key) if isinstance(state, dict) else getattr(state, key, None)
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif value is not None and not isinstance(value, int | float | str):
            yield from _of_state(f"{name}.{key}", value, depth + 1)


def _plain(name: str, tensor: Tensor, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors that make up a tensor."""
    if type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor):
        yield name, tensor
    elif hasattr(tensor, "__tensor_flatten__") and depth < 4:  # torchao, quanto and others made of several tensors
        for key in sorted(tensor.__tensor_flatten__()[0]):
            inner = getattr(tensor, key)
            yield from _plain(f"{name}.{type(tensor).__name__}.{key}", _readable(name, inner, None), depth + 1)
    else:  # a class around the packed bytes
        with torch._C.DisableTorchFunctionSubclass():
            try:
                plain = tensor.detach().as_subclass(Tensor)
                plain.untyped_storage().data_ptr()
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    f"model: {name} is a {type(tensor).__name__}, whose values cannot be read ({error}); a checkpoint "
                    "or sweep folder must record which model it belongs to: omit it"
                ) from None
        yield name, plain


def _sample(name: str, tensor: Tensor) -> Tensor:
    """The bytes of evenly spread elements, uint8 on the tensor's device, without copying the whole tensor."""
    n = tensor.numel()
    # An odd step reaches every column of a matrix of even width.
    step = 1 if n <= _WHOLE else n // _SAMPLE | 1
    try:
        if is_dtensor(tensor):
            values = sampled(tensor, torch.arange(0, n, step, device=tensor.device))
        elif tensor.is_contiguous() or not n:
            values = tensor.detach().reshape(-1)[::step].contiguous()
        else:
            index = torch.arange(0, n, step, device=tensor.device)
            values = tensor.detach()[torch.unravel_index(index, tensor.shape)].contiguous()
        return values.view(-1, 1).view(torch.uint8).flatten()  # [elements, bytes of each]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"model: {name}, {tensor.dtype} on {tensor.device}, cannot be read ({error})") from None


def _on_host(samples: list[Tensor]) -> list[bytes]:
    """The bytes of all samples in order, with one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for number, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append(number)
    values = [b""] * len(samples)
    for numbers in by_device.values():
        host = torch.cat([samples[number] for number in numbers]).cpu().numpy().tobytes()
        start = 0
        for number in numbers:
            end = start + samples[number].numel()
            values[number] = host[start:end]
            start = end
    return values
