"""Argument checks that the ops share. Values are read of CPU tensors only, so that nothing waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import is_real
from .torch_internals import is_eager


def floating_tensor(name: str, value: object, shape: str) -> Tensor:
    """`value` as a floating tensor, or a TypeError that says what was expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a floating-point tensor {shape}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point tensor {shape}")
    return value


def number(name: str, value: object) -> float:
    """`value` as a float. Booleans are refused, and so are tensors: reading one waits for the GPU."""
    if not (is_real(value) or isinstance(value, (torch.SymFloat, torch.SymInt))):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    try:
        result = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name}: got an integer that no float holds, expected a number") from None
    if result != result:
        raise ValueError(f"{name}: got nan, expected a number")
    return result


_LEAST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def positive(name: str, value: object) -> float:
    """`value` as a float that is also positive in float32, which the kernels take it in."""
    result = number(name, value)
    if not _LEAST <= result <= _LARGEST:
        raise ValueError(f"{name}: got {value}, expected a positive number" + " that float32 holds" * (result > 0))
    return result


def index_vector(name: str, value: object, length: int, device: torch.device) -> Tensor:
    """`value` as an int64 vector of `length` on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int64 tensor [{length}]")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {value.dtype}, expected int64")
    same_device(name, value, device)
    if value.shape != (length,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({length},)")
    return value.to(torch.int64).contiguous()


def row_values(name: str, value: object, length: int, device: torch.device) -> Tensor:
    """`value`, one number per row, as a float32 vector of `length` on `device` (float64 is kept)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor [{length}]")
    if value.dtype.is_complex:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected real numbers")
    if value.requires_grad:
        raise ValueError(f"{name}: requires a gradient, but it is not differentiated")
    same_device(name, value, device)
    if value.shape != (length,):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({length},)")
    return value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).contiguous()


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected one on {device}")


def strengths(value: float | Tensor, length: int, device: torch.device, *, learn: str) -> tuple[float, Tensor | None]:
    """`value` as (a float, one value per row [length] or None), whose product is the strength β of each row.

    A tensor without axes stays a tensor too: reading its value would wait for the GPU. `learn` names what has gradients
    instead.
    """
    if not isinstance(value, Tensor):
        return number("strength", value), None
    if value.requires_grad:
        raise ValueError(f"strength: requires a gradient, but it is not differentiated; learn {learn} instead")
    if value.dim() == 0:
        value = value.to(device).expand(length)
    return 1.0, row_values("strength", value, length, device)


def head(hidden: object, weight: object, bias: Tensor | None, *, rows: str, prefix: str = "") -> None:
    """A model's last hidden states [`rows`, d], where `rows` is "N" or "...", its head [V, d] and its bias [V].

    `prefix` precedes the arguments' names.
    """
    hidden = floating_tensor(f"{prefix}hidden", hidden, f"[{rows}, d]")
    weight = floating_tensor(f"{prefix}weight", weight, "[V, d]")
    if hidden.dim() < 1 or hidden.shape[-1] == 0 or (rows == "N" and hidden.dim() != 2):
        raise ValueError(f"{prefix}hidden: got shape {tuple(hidden.shape)}, expected [{rows}, d]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{prefix}weight: got dtype {weight.dtype}, expected {hidden.dtype} as {prefix}hidden has")
    same_device(f"{prefix}weight", weight, hidden.device)
    if bias is not None:
        same_device(f"{prefix}bias", floating_tensor(f"{prefix}bias", bias, "[V]"), hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def row_groups(group: object, n_groups: int, n_rows: int, device: torch.device) -> Tensor | None:
    """The group of each row, int64 [n_rows]; None if all rows are in the only group."""
    if group is not None:
        return index_vector("group", group, n_rows, device)
    if n_groups == 1:
        return None
    if n_groups != n_rows:
        raise ValueError(f"group: got None for {n_groups} groups and {n_rows} rows, expected an int64 tensor [B]")
    return torch.arange(n_rows, device=device)


def ids_in_range(name: str, ids: Tensor, bound: int, what: str) -> None:
    """The check that the C++ kernels make themselves, for plain PyTorch. Reads CPU tensors outside of traces only."""
    if ids.device.type != "cpu" or not is_eager(ids):
        return
    outside = ((ids < 0) | (ids >= bound)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"{name}: row {row} has {what} {int(ids[row])}, expected 0 to {bound - 1}")
