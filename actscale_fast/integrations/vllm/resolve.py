"""From the options of a request and the loaded interventions to its plan: every part folded into rows of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...interventions import ActivScalar, DynScalar, Intervention, SteerVec
from .plan import NO_ROW, Plan, Row
from .request_options import EVERYWHERE, ROWS_HINT, STRENGTH, WHERE, RequestOptions, Where
from .served_model import ServedModel

_Slot = int | None


class _Part(NamedTuple):
    """An intervention at one location, its strength, and which of its position slots each token uses."""

    name: str
    strength: float
    intervention: Intervention
    prompt: _Slot
    generated: _Slot
    special: dict[int, int]


def resolve(
    options: RequestOptions, found: Sequence[Intervention], prompt_length: int, served: ServedModel
) -> Plan | None:
    """The plan of a request; None where it leaves every token as it is.

    Args:
        options: what the request asks for.
        found: the intervention of each name.
        prompt_length: the number of tokens of the prompt.
        served: the served model.

    Raises:
        ValueError: positions outside the prompt, positions for an intervention that has its own, a combination that the
            table cannot hold, or a strength that makes a parameter infinite.
    """
    parts = [
        _placed(name, strength * factor, single, options.where, prompt_length)
        for name, strength, intervention in zip(options.names, options.strengths, found, strict=True)
        for factor, single in intervention.pairs
    ]
    rows: dict[str, Row] = {}
    numbers: dict[tuple[_Slot, ...], int] = {}

    def number_of(slot_of: Callable[[_Part], _Slot]) -> int:
        slots = tuple(slot_of(part) for part in parts)
        if slots not in numbers:
            row = _folded([(part, slot) for part, slot in zip(parts, slots, strict=True) if slot is not None], served)
            if not row.is_identity:
                rows.setdefault(row.key, row)
            numbers[slots] = NO_ROW if row.is_identity else list(rows).index(row.key)
        return numbers[slots]

    generated = number_of(lambda part: part.generated)
    prompt = number_of(lambda part: part.prompt)
    special = {
        position: number
        for position in sorted({position for part in parts for position in part.special})
        if (number := number_of(lambda part, at=position: part.special.get(at, part.prompt))) != prompt  # type: ignore[misc]
    }
    if not rows:
        return None
    if len(rows) > served.rows_per_request:
        raise ValueError(
            f"actscale: {options} needs {len(rows)} rows of the table, one for each kind of token, expected at most "
            f"{served.rows_per_request}; {ROWS_HINT}"
        )
    return Plan(tuple(rows.values()), prompt, generated, special, prompt_length)


def _placed(name: str, strength: float, single: Intervention, where: Where, prompt_length: int) -> _Part:
    positions = single.location.positions
    if positions is None:
        special = dict.fromkeys((_inside(position, prompt_length) for position in where.positions), 0)
        return _Part(name, strength, single, 0 if where.prompt else None, 0 if where.generated else None, special)
    if where != EVERYWHERE:
        raise ValueError(
            f"{WHERE}: {name!r} was saved with positions of its own ({single.location.tokens}), so that none can be "
            'chosen; expected "all" or nothing'
        )
    slots: dict[int, int] = {}
    for slot, position in enumerate(positions):
        at = position if position >= 0 else prompt_length + position
        if 0 <= at < prompt_length:  # outside the prompt it does nothing, as elsewhere
            slots.setdefault(at, slot)
    return _Part(name, strength, single, None, len(positions) if single.location.generated else None, slots)


def _inside(position: int, prompt_length: int) -> int:
    if not -prompt_length <= position < prompt_length:
        raise ValueError(
            f"{WHERE}: got position {position} for a prompt of {prompt_length} tokens, expected {-prompt_length} to "
            f"{prompt_length - 1}"
        )
    return position % prompt_length


def _folded(parts: Sequence[tuple[_Part, int]], served: ServedModel) -> Row:
    """One row for interventions that are applied one after the other, computed in float64 and rounded once."""
    shape = (served.n_layers, served.n_heads)
    wide = (*shape, served.head_dim)
    alpha = np.zeros(shape)
    shift: NDArray[np.float64] | None = None
    probes: NDArray[np.float64] | None = None
    output: NDArray[np.float64] | None = None
    for part, slot in parts:
        single, strength = part.intervention, part.strength
        if strength == 0:
            continue
        layers = list(single.location.layers)
        if single.location.site == "attn_out":  # after the heads, whatever the order of the names
            assert isinstance(single, SteerVec)
            output = np.zeros((served.n_layers, served.hidden_size)) if output is None else output
            output[layers] += strength * _numbers(single.vectors)[:, slot, 0]
            continue
        if probes is not None:
            raise ValueError(
                f"actscale: a DynScalar is followed by {part.name!r}, expected it last and only once: what follows it "
                "would have to be applied to each token's own result"
            )
        if isinstance(single, ActivScalar):
            factor = np.zeros(shape)
            factor[layers] = strength * _numbers(single.alpha)[:, slot]
            alpha = alpha + factor + alpha * factor  # (1 + α)(1 + β·α') − 1
            shift = None if shift is None else shift * (1 + factor[..., None])
        elif isinstance(single, SteerVec):
            shift = np.zeros(wide) if shift is None else shift
            shift[layers] += strength * _numbers(single.vectors)[:, slot]
        elif isinstance(single, DynScalar):
            probes = np.zeros(wide)
            probes[layers] = strength * _numbers(single.probes)[:, 0]  # shared by positions
    names = " + ".join(dict.fromkeys(part.name for part, _ in parts))
    return Row(
        _rounded(alpha, names),
        None if shift is None else _rounded(shift, names),
        None if probes is None else _rounded(probes, names),
        None if output is None else _rounded(output, names),
    )


def _numbers(parameter: object) -> NDArray[np.float64]:
    return parameter.detach().cpu().double().numpy()  # type: ignore[attr-defined,no-any-return]


def _rounded(values: NDArray[np.float64], names: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{STRENGTH}: the parameters of {names} are infinite in float32 at this strength")
    return rounded
