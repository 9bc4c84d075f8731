"""What switching something on in a model returns: it goes out by `.remove()`, or at the end of a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Handle:
    """A context manager around `remove`."""

    def remove(self) -> None:
        """Undo; nothing happens the second time."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
