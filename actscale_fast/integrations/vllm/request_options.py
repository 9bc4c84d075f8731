"""What a request asks for: the `actscale…` keys of `SamplingParams.extra_args` (over HTTP: of `vllm_xargs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..._json import shown
from ..._suggestions import did_you_mean

NAME, STRENGTH, WHERE = "actscale", "actscale_strength", "actscale_where"
#: The key of the plan that the plug-in attaches; refused in what a client sends.
PLAN = "actscale_plan"
OPTIONS = (NAME, STRENGTH, WHERE)
#: No request names more interventions.
MOST_NAMES = 64
_STRONGEST = 1e30
ROWS_HINT = "the server can be started with a larger ACTSCALE_ROWS_PER_REQUEST"


@dataclass(frozen=True)
class Where:
    """The tokens that a request steers: all of the prompt or some of its positions, and the generated ones or not."""

    prompt: bool = True
    generated: bool = True
    positions: tuple[int, ...] = ()  # of the prompt; negative ones count from its last token


EVERYWHERE = Where()
_SPOKEN = {"all": EVERYWHERE, "prompt": Where(generated=False), "generated": Where(prompt=False)}
_WHERE_EXPECTED = '"all", "prompt", "generated" or a list of prompt positions'


@dataclass(frozen=True)
class RequestOptions:
    """The options of one request: names, one strength per name, and the tokens."""

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    where: Where = EVERYWHERE

    def __str__(self) -> str:
        return " + ".join(f"{b:g}·{name}" for name, b in zip(self.names, self.strengths, strict=True))


def mentions(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request has a key that belongs to this plug-in."""
    return bool(extra_args) and any(is_option(key) for key in extra_args or ())


def parse(extra_args: Mapping[str, Any] | None) -> RequestOptions | None:
    """The options of a request; None where it has no key of this plug-in.

    Raises:
        ValueError: an unknown or reserved key, or a value that its key cannot have.
    """
    found = [key for key in extra_args or () if is_option(key)]
    if not found or extra_args is None:
        return None
    for key in found:
        if key == PLAN:
            raise ValueError(f"{PLAN}: reserved for the server, expected {', '.join(OPTIONS)}")
        if key not in OPTIONS:
            raise ValueError(f"{key}: unknown, expected {', '.join(OPTIONS)}{did_you_mean(key, OPTIONS)}")
    if NAME not in extra_args:
        raise ValueError(f"{NAME}: missing, expected the name of an intervention beside {', '.join(sorted(found))}")
    names = _names(extra_args[NAME])
    return RequestOptions(
        names,
        _strengths(extra_args.get(STRENGTH, 1.0), len(names)),
        _where(extra_args.get(WHERE, "all")),
    )


def is_option(key: object) -> bool:
    """Whether a key belongs to this plug-in, however it is spelled."""
    return isinstance(key, str) and key.casefold().replace("-", "_").startswith(NAME)


def _names(value: Any) -> tuple[str, ...]:
    names = value.split("+") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{NAME}: got {shown(value)}, expected a name, "first+second" or a list of names')
    stripped = tuple(name.strip() for name in names)
    if not stripped or not all(stripped):
        raise ValueError(f"{NAME}: got {shown(value)}, which holds an empty name")
    if len(stripped) > MOST_NAMES:
        raise ValueError(f"{NAME}: got {len(stripped)} names, expected at most {MOST_NAMES}")
    return stripped


def _strengths(value: Any, n_names: int) -> tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value] * n_names
    if len(values) != n_names:
        raise ValueError(
            f"{STRENGTH}: got {len(values)} numbers for {n_names} names, expected one number or one for each"
        )
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{STRENGTH}: got {shown(number)}, expected a number")
        if not abs(number) <= _STRONGEST:  # also where it is not a number, or an integer without a float
            raise ValueError(f"{STRENGTH}: got {shown(number)}, expected a finite number, {_STRONGEST:g} at most")
    return tuple(float(number) for number in values)


def _where(value: Any) -> Where:
    if isinstance(value, str):
        if value not in _SPOKEN:
            raise ValueError(f"{WHERE}: got {shown(value)}, expected {_WHERE_EXPECTED}{did_you_mean(value, _SPOKEN)}")
        return _SPOKEN[value]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{WHERE}: got {shown(value)}, expected {_WHERE_EXPECTED}")
    positions = [item for item in value if item != "generated"]
    for item in positions:
        if type(item) is not int:
            raise ValueError(f'{WHERE}: got {shown(item)} in the list, expected whole numbers, or "generated" as well')
    if len(set(positions)) < len(positions):
        raise ValueError(f"{WHERE}: got {shown(value)}, which names a position twice")
    return Where(prompt=False, generated=len(positions) < len(value), positions=tuple(positions))
