"""What one request does to its tokens, in numbers: the plan that travels with it to the workers.

A row holds the parameters of all layers and heads for one kind of token. Interventions that are applied together, with
their strengths, are folded into one row. The plan says which row each token uses, by its position: tokens from the
prompt's length on are generated, in whatever phase they are computed, since a request that was preempted computes them
again as a prefill.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .settings import VECTORS_AT_OUTPUT

#: The parts of a row, and the kind of intervention that each is for.
PARTS = {"alpha": "ActivScalar", "shift": "SteerVec", "probes": "DynScalar", "output": VECTORS_AT_OUTPUT}
NO_ROW = -1
_FORMAT = 2


@dataclass(frozen=True)
class Row:
    """The parameters of one kind of token: at heads y = z·(1 + ⟨u, z⟩) with z = x·(1 + α) + v.

    Attributes:
        alpha: α, float32 [L, H].
        shift: v, float32 [L, H, D], or None.
        probes: u, float32 [L, H, D], or None.
        output: what is added to the output of the attention's projection, float32 [L, hidden size], or None.
    """

    alpha: NDArray[np.float32]
    shift: NDArray[np.float32] | None = None
    probes: NDArray[np.float32] | None = None
    output: NDArray[np.float32] | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for name in PARTS:
            values = getattr(self, name)
            digest.update(f"{name}{None if values is None else values.shape}".encode())
            digest.update(b"" if values is None else np.ascontiguousarray(values, dtype="<f4").tobytes())
        object.__setattr__(self, "key", digest.hexdigest())

    @property
    def kinds(self) -> set[str]:
        """The kinds of interventions that the row needs room for."""
        return {kind for name, kind in PARTS.items() if (values := getattr(self, name)) is not None and values.any()}

    @property
    def is_identity(self) -> bool:
        """Whether the row changes nothing."""
        return not self.kinds


@dataclass(frozen=True)
class Plan:
    """The rows of one request and the row of each of its tokens.

    Attributes:
        rows: the different rows, at least one.
        prompt: the row of the prompt's tokens, or NO_ROW.
        generated: the row of the generated tokens, or NO_ROW.
        special: rows of single positions of the prompt, counted from its first token.
        prompt_length: the number of tokens of the prompt.
    """

    rows: tuple[Row, ...]
    prompt: int
    generated: int
    special: Mapping[int, int]
    prompt_length: int

    def row_numbers(self, start: int, count: int) -> NDArray[np.int64]:
        """The row of each token from position `start` on, int64 [count]; NO_ROW: the token stays as it is."""
        numbers = np.full(count, self.generated, dtype=np.int64)
        numbers[: max(0, min(count, self.prompt_length - start))] = self.prompt
        if start < self.prompt_length:
            for position, row in self.special.items():
                if start <= position < start + count:
                    numbers[position - start] = row
        return numbers

    @property
    def salt(self) -> str:
        """A digest that differs where the keys and values of a prompt's tokens may differ.

        It depends on the prompt's length unless all tokens are steered alike, since a token that one request generated
        may be a token of the next request's prompt.
        """
        uniform = self.prompt == self.generated and not self.special
        digest = hashlib.sha256(b"".join(bytes.fromhex(row.key) for row in self.rows))
        numbers = [self.prompt, self.generated, NO_ROW if uniform else self.prompt_length]
        numbers += [number for item in sorted(self.special.items()) for number in item]
        digest.update(struct.pack(f"<{len(numbers)}q", *numbers))
        return digest.hexdigest()

    def encoded(self) -> dict[str, Any]:
        """Strings, numbers, lists and bytes, as a request can carry them to other processes."""
        return {
            "format": _FORMAT,
            "shape": list(_shape(self.rows)),
            "rows": [{name: _bytes(getattr(row, name)) for name in PARTS} for row in self.rows],
            "prompt": self.prompt,
            "generated": self.generated,
            "positions": list(self.special),
            "position_rows": list(self.special.values()),
            "prompt_length": self.prompt_length,
        }

    @classmethod
    def decode(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `encoded`.

        Raises:
            ValueError: the data are not those of a plan.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}")
            layers, heads, width, hidden = data["shape"]
            wide = (layers, heads, width)
            shapes = {"alpha": (layers, heads), "shift": wide, "probes": wide, "output": (layers, hidden)}
            rows = tuple(Row(**{name: _array(values[name], shapes[name]) for name in PARTS}) for values in data["rows"])
            special = dict(zip(data["positions"], data["position_rows"], strict=True))
            plan = cls(rows, data["prompt"], data["generated"], special, data["prompt_length"])
            used = {plan.prompt, plan.generated, *special.values()}
            if not rows or not used <= set(range(NO_ROW, len(rows))):
                raise ValueError("a row that is missing")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"actscale_plan: damaged ({type(error).__name__}: {error})") from None
        return plan


def _shape(rows: Sequence[Row]) -> tuple[int, int, int, int]:
    """Layers, heads, their width, and the hidden size; 1 for a width that no row has."""
    layers, heads = rows[0].alpha.shape
    width = max(_last(part) for row in rows for part in (row.shift, row.probes))
    return layers, heads, width, max(_last(row.output) for row in rows)


def _last(values: NDArray[np.float32] | None) -> int:
    return 1 if values is None else values.shape[-1]


def _bytes(values: NDArray[np.float32] | None) -> bytes | None:
    return None if values is None else np.ascontiguousarray(values, dtype="<f4").tobytes()


def _array(data: bytes | None, shape: tuple[int, ...]) -> Any:
    return None if data is None else np.frombuffer(data, dtype="<f4").reshape(shape)
