"""Activation scalars: h·(1 + β·α) (arXiv 2410.04962, eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_counts, is_real
from ..architectures.location import Location
from ..ops import scale_heads
from .base import Intervention
from .placement import Placement
from .scalar_index import ScalarRow, Selection, scalar_rows

if TYPE_CHECKING:
    from pandas import DataFrame


#: Scalars of at most this share of the largest are too small to be seen in a picture.
VISIBLE = 0.05


class ActivScalar(Intervention):
    """A signed scalar for each layer, position slot and head (or whole site): h·(1 + β·α).

    This is eq. 5 of arXiv 2410.04962. `alpha` is fp32 [L, P, H] at the head site, [L, P, 1] at a whole site, and
    [G, L, P, ·] when stacked. α = 0 is the identity, α = −1 with β = 1 removes the head, and β = −1 inverts the
    intervention. `scalars[layer, head]` reads and writes single scalars.

    Example:
        >>> scalars[12, 3]  # layer 12 of the model, its head 3
        -1.52
        >>> scalars[12, 3] = 0.0
        >>> scalars[:, 3] = 0.5  # head 3 in every layer that the intervention holds
        >>> scalars.top(10)
    """

    multiplies: ClassVar[bool] = True
    edits_own_heads: ClassVar[bool] = True
    alpha: nn.Parameter

    @classmethod
    def parameter_tails(cls, location: Location) -> dict[str, tuple[int, ...]]:
        return {"alpha": (location.n_heads,)}

    def edit(self, x: Tensor, layer: int, strength: float | Tensor, placement: Placement) -> Tensor:
        alpha = placement.of(self.of_layer(self.alpha, layer, x.device, placement.heads))
        return scale_heads(x, alpha, strength=strength, group=placement.group)

    def __getitem__(self, index: Any) -> float | Tensor:
        """One scalar as a float, or several as a tensor.

        Args:
            index: `[layer, head]`, at a site without heads `[layer]`; with listed positions `[layer, head, position]`
                or `[layer, position]`, in a stack with the group before the layer. A layer is the model's layer number,
                negative from the end, a head likewise; a position is one of those listed, or "generated". Each may be a
                slice, `:` or a list; what is left out at the end means all.

        Returns:
            A float where one scalar is named, else float32 with one axis per index that names several, on the
            parameters' device: a view of `alpha`, or a copy where a list was given.

        Raises:
            IndexError: a layer, head or position that the intervention does not hold; the message names those held.
            TypeError: an index that is not a number, a slice or a list.
        """
        chosen = Selection(self.location, self.n_groups, index).of(self.alpha.detach())
        return float(chosen) if chosen.dim() == 0 else chosen

    def __setitem__(self, index: Any, value: object) -> None:
        """Set scalars in place; a patch that is applied uses them from the next forward pass on.

        Args:
            index: as for reading.
            value: a finite number, or numbers that can be broadcast to the chosen scalars.

        Raises:
            IndexError, TypeError: as for reading, and a value that is not a number.
            ValueError: a value that is not finite, or of another shape.
        """
        selection = Selection(self.location, self.n_groups, index)
        try:
            if not (is_real(value) or isinstance(value, Tensor | list | tuple) or hasattr(value, "__array__")):
                raise TypeError
            values = torch.as_tensor(value)
            if values.dtype == torch.bool or values.is_complex():
                raise TypeError
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"value: got {type(value).__name__}, expected numbers") from None
        values = values.detach().to(self.alpha.device, self.alpha.dtype)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("value: got a value that is not finite in float32, expected finite numbers")
        with torch.no_grad():
            selection.put(self.alpha, values)

    #: Without it, Python would try the layers 0, 1, … one after the other.
    __iter__ = None

    def top(self, k: int = 10) -> list[ScalarRow]:
        """The k scalars with the largest magnitude, largest first; those that are exactly 0 are left out.

        Returns:
            Rows (layer, head, position, value, group): head is None at a site without heads, position None where every
            token is steered, and group None unless the interventions are stacked.
        """
        check_counts(k=k)
        rows = scalar_rows(self.alpha, self.location, self.n_groups)
        return sorted((row for row in rows if row.value), key=lambda row: -abs(row.value))[:k]

    def count_above(self, share: float = VISIBLE) -> int:
        """How many scalars have a magnitude above a share of the largest one; `n_active` also counts tiny ones.

        Args:
            share: between 0 and 1; 0 counts all that are not 0.

        Returns:
            The number of scalars with |α| > share · max|α|, in a stack over all its interventions.

        Raises:
            ValueError: a share that is not between 0 and 1.

        Example:
            >>> scalars.n_active, scalars.count_above(0.05)
            (72, 57)
        """
        if not is_real(share) or not 0 <= share <= 1:
            raise ValueError(f"share: got {share!r}, expected a number between 0 and 1")
        sizes = self.alpha.detach().abs()
        return int((sizes > share * sizes.max()).sum())

    def to_frame(self) -> DataFrame:
        """All scalars as a pandas DataFrame with the columns layer, head, position and value (and group, if stacked).

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas") from error
        frame = pandas.DataFrame(scalar_rows(self.alpha, self.location, self.n_groups), columns=ScalarRow._fields)
        return frame if self.n_groups is not None else frame.drop(columns="group")

    def table(self) -> tuple[list[str], list[list[str]]]:
        rows = self.top() if self.n_active else []
        place = {
            "group": self.n_groups is not None,
            "layer": True,
            "head": self.location.site == "head",
            "position": self.location.positions is not None,
        }
        columns = [name for name, is_shown in place.items() if is_shown]
        cells = [[*(str(getattr(row, name)) for name in columns), f"{row.value:+.3f}"] for row in rows]
        return [*columns, "α"], cells

    def _notes(self) -> list[str]:
        return [
            f"{self.n_active} of {self.n_parameters} parameters are active (not 0), {self.count_above()} of them above "
            f"{VISIBLE:.0%} of the largest; their ℓ1 norm is {self.l1:.4g}"
        ]
