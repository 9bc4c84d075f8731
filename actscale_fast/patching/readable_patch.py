"""How an applied intervention prints: whether it is on, its strength, and the intervention's own table."""

from __future__ import annotations

from torch import Tensor, nn

from .._tables import Readable
from ..interventions import Intervention


class ReadablePatch(Readable):
    """A patch that prints as a short table; see `patch`."""

    intervention: Intervention
    strength: float | Tensor

    def _patched_model(self) -> nn.Module | None:
        """The model that the patch is on; None: it is off, or the model is gone."""
        raise NotImplementedError

    def _is_paused(self) -> bool:
        raise NotImplementedError

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text: those of the intervention."""
        return self.intervention.table()

    def _heading(self) -> str:
        return f"{self._state()}: {self.intervention._heading()}"

    def _notes(self) -> list[str]:
        return self.intervention._notes()

    def __repr__(self) -> str:
        return f"<{self._state()}: {self.intervention!r}>"

    def _state(self) -> str:
        model = self._patched_model()
        per_row = isinstance(self.strength, Tensor) and self.strength.dim() > 0
        strength = "one per row" if per_row else f"{float(self.strength):g}"
        where = "removed" if model is None else f"on {type(model).__name__}"
        paused = ", paused" if model is not None and self._is_paused() else ""
        return f"{type(self).__name__} {where}, strength {strength}{paused}"
