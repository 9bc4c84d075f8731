"""Which parameter slot each token of a forward pass uses, from its padding, KV cache and prompt.

Positions count the real tokens of the prompt: 0 is the first one and −1 the last one. Padding never counts, on either
side. Slot j belongs to the j-th listed position; one more slot, where requested, to all generated tokens. The slot
after the last one is empty: its parameters are zero, so the token stays as it is. No step here synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..interventions import Intervention, Placement
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
    length, mask = _prompt_of(call, past)
    if isinstance(past, int) and isinstance(length, int) and past >= length:  # generated tokens only
        return Placement(slot=location.n_slots - 1, group=group) if location.generated else None
    if mask is not None:
        mask = repeated_rows("attention_mask", mask.to(device), call.n_rows)
    numbers = call.sequence_numbers
    slots = slot_index(
        intervention.wanted_positions.to(device), call.n_tokens, past=past, length=length, mask=mask,
        generated=location.generated, sequence_numbers=None if numbers is None else numbers.to(device),
    )  # fmt: skip
    if group is not None:
        slots = slots + group[:, None] * (location.n_slots + 1)
    rows = torch.arange(call.n_rows, device=device) if slots.shape[0] > 1 else None
    return Placement(index=slots, group=rows)


def _prompt_of(call: Call, past: int | Tensor) -> tuple[int | Tensor, Tensor | None]:
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
    # An empty cache begins a prompt, a filled one is past it. The length of a static cache is known on its device only.
    columns = (past == 0) * call.n_tokens if isinstance(past, Tensor) else call.n_tokens
    return columns, None if flat is None else flat[:, : call.n_tokens] != 0


def slot_index(
    wanted: Tensor,
    n_tokens: int,
    *,
    past: int | Tensor,
    length: int | Tensor,
    mask: Tensor | None = None,
    generated: bool = False,
    sequence_numbers: Tensor | None = None,
) -> Tensor:
    """The slot of each token of one forward pass.

    Args:
        wanted: int64 [P], the listed positions; negative ones count from the prompt's last token.
        n_tokens: T, the tokens of this pass. They stand in the columns past … past + T − 1.
        past: the columns before them (the KV cache's length), an int or an int64 scalar tensor.
        length: the columns of the prompt, padding included.
        mask: bool [B, ≥ length], the real tokens of the prompt; None: all of them.
        generated: whether the tokens after the prompt have a slot of their own, number P.
        sequence_numbers: int64 [R, T], ascending, R = B or 1: the sequences of a row, each a prompt of its own. None:
            a row is one sequence. Only for a pass that holds the whole prompt.

    Returns:
        int64 [B, T] (B = 1 without a mask). P (P + 1 with `generated`) is the empty slot. A position outside a row's
        prompt matches nothing. Where two positions fall on one token, the first listed one counts.
    """
    n_wanted = wanted.shape[0]
    columns = torch.arange(n_tokens, device=wanted.device) + past  # [T]
    in_prompt = (columns < length)[None]  # [1, T]
    count: int | Tensor = length
    rank = columns[None]  # [1, T]: the number of real tokens before this one
    if mask is not None:
        seen = mask.to(torch.int64).cumsum(-1)  # [B, S]
        within = columns.clamp(max=mask.shape[1] - 1)
        rank = seen[:, within] - 1  # [B, T]
        in_prompt = in_prompt & mask[:, within]
        count = seen[:, -1:]  # [B, 1]
    if sequence_numbers is not None and mask is None:
        numbers = sequence_numbers.contiguous()
        start = torch.searchsorted(numbers, numbers)  # [R, T]: where each token's own sequence begins
        count = torch.searchsorted(numbers, numbers, right=True) - start  # [R, T]
        rank = torch.arange(n_tokens, device=wanted.device) - start
    empty = n_wanted + generated
    slots = torch.full_like(rank, empty)
    if n_wanted:
        total = count[..., None] if isinstance(count, Tensor) and count.dim() == 2 else count  # [B, 1 or T, 1]
        targets = torch.where(wanted < 0, wanted + total, wanted)  # [P] or [B, 1 or T, P]
        hit = (rank[:, :, None] == targets) & in_prompt[:, :, None]  # [B, T, P]
        slots = torch.where(hit, torch.arange(n_wanted, device=wanted.device), empty).amin(-1)
    if generated:
        slots = torch.where((columns >= length)[None], n_wanted, slots)
    return slots


def per_row(name: str, values: Tensor, call: Call) -> Tensor:
    """One value per row of the pass; in generate(), the value of a prompt serves all its beams or returned sequences.

    Raises:
        ValueError: the number of values does not fit the number of rows.
    """
    if values.shape[0] != call.n_rows and call.prompt is None:
        raise ValueError(
            f"{name}: got {values.shape[0]} values for a batch of {call.n_rows} rows, expected one per row"
        )
    return repeated_rows(name, values, call.n_rows)


def refuse_several_sequences(name: str, call: Call) -> None:
    """ValueError where position ids say that one row holds several sequences; inside a graph a RuntimeError."""
    numbers = call.sequence_numbers
    if numbers is None:
        return
    message = (
        f"{name}: position_ids mark several sequences in one row, to which one value per row cannot apply; pad the "
        "batch, or give one value for all rows"
    )
    several = numbers[:, -1].any()
    if several.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing can be read while a graph is captured; the warm-up passes before it were checked
    if torch.compiler.is_compiling():
        torch._assert_async(~several, message)
    elif bool(several):
        raise ValueError(message)


def repeated_rows(name: str, values: Tensor, n_rows: int) -> Tensor:
    """values [B, ...] with each row repeated n_rows / B times, as generate() repeats the prompt."""
    if values.shape[0] == n_rows:
        return values
    times, rest = divmod(n_rows, values.shape[0])
    if rest or not times:
        raise ValueError(f"{name}: got {values.shape[0]} rows for a batch of {n_rows}, expected {n_rows} or a divisor")
    return values.repeat_interleave(times, 0)
