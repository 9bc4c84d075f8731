"""The handle of something that was switched on in a model: `.remove()`, or the end of a `with` block, undoes it."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Handle:
    """A context manager around `remove`."""

    def remove(self) -> None:
        """Undo it. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
