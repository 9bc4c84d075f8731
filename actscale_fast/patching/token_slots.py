"""From one forward pass to the slots of its tokens: padding, cache and prompt, without a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interventions import Intervention, Placement, slot_index
from .forward_call import Call


def place(intervention: Intervention, call: Call, group: Tensor | None, device: torch.device) -> Placement | None:
    """The placement of an intervention with positions; None where the pass holds no token that it edits.

    Args:
        intervention: gives the positions and the number of slots.
        call: the forward pass.
        group: int64 [B] on `device`, or None.
        device: where the steered layers compute.

    Raises:
        ValueError: the mask is not [B, T], so that padding cannot be told, and no prompt was announced.
    """
    location = intervention.location
    past = call.past if isinstance(call.past, int) else call.past.to(device)
    length, mask = _prompt(call, past)
    if isinstance(past, int) and isinstance(length, int) and past >= length:  # generated tokens only
        return Placement(slot=location.n_slots - 1, group=group) if location.generated else None
    if mask is not None:
        mask = expand("attention_mask", mask.to(device), call.n_rows)
    wanted = intervention.wanted_positions.to(device)
    separate = call.separate
    slots = slot_index(
        wanted, call.n_tokens, past=past, length=length, mask=mask, generated=location.generated,
        separate=None if separate is None else separate.to(device),
    )  # fmt: skip
    if group is not None:
        slots = slots + group[:, None] * (location.n_slots + 1)
    rows = torch.arange(call.n_rows, device=device) if slots.shape[0] > 1 else None
    return Placement(index=slots, group=rows)


def per_row(name: str, values: Tensor, call: Call) -> Tensor:
    """One value per row of the pass; inside generate() a prompt's value serves all its beams or returned sequences."""
    if values.shape[0] != call.n_rows and call.prompt is None:
        raise ValueError(
            f"{name}: got {values.shape[0]} values for a batch of {call.n_rows} rows, expected one per row"
        )
    return expand(name, values, call.n_rows)


def refuse_separate_rows(name: str, call: Call) -> None:
    """ValueError where position ids say that several sequences stand in one row; inside a graph a RuntimeError."""
    separate = call.separate
    if separate is None:
        return
    message = (
        f"{name}: position_ids tell several sequences of one row apart, which one value per row cannot serve; pad the "
        "batch, or give one value for all rows"
    )
    several = separate[:, -1].any()
    if several.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read while a graph is captured; the warm-up passes before it were
    if torch.compiler.is_compiling():
        torch._assert_async(~several, message)
    elif bool(several):
        raise ValueError(message)


def expand(name: str, values: Tensor, n_rows: int) -> Tensor:
    """values [B, ...] with each row repeated n_rows / B times, as generate() repeats the prompt."""
    if values.shape[0] == n_rows:
        return values
    times, rest = divmod(n_rows, values.shape[0])
    if rest or not times:
        raise ValueError(f"{name}: got {values.shape[0]} rows for a batch of {n_rows}, expected {n_rows} or a divisor")
    return values.repeat_interleave(times, 0)


def _prompt(call: Call, past: int | Tensor) -> tuple[int | Tensor, Tensor | None]:
    """(columns of the prompt, its real tokens as bool [B, ≥ columns] or None)."""
    if call.prompt is not None:
        length, mask = call.prompt.length, call.prompt.mask
        flat = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 2 else None
        if mask is None and flat is not None and flat.shape[1] >= length:
            mask = flat[:, :length] != 0
        return length, mask
    if isinstance(past, int) and past > 0:
        return 0, None
    flat = call.padding
    if flat is not None and isinstance(past, int) and flat.shape[1] > past + call.n_tokens:
        raise ValueError(
            f"attention_mask: got {flat.shape[1]} columns for {call.n_tokens} tokens and {past} in the KV cache, so "
            "that their positions cannot be told; has the caller lost its cache? (positions of a pass inside a prompt: "
            "`with handle.prompt(n, mask)`)"
        )
    # An empty cache begins a prompt, a filled one is past it; a static cache knows its length on the device only.
    columns = (past == 0) * call.n_tokens if isinstance(past, Tensor) else call.n_tokens
    return columns, None if flat is None else flat[:, : call.n_tokens] != 0
