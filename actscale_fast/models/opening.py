"""Opening a frozen model for partial runs: its head read, its products by oneDNN, gates at its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .adapter import ModelLayout
from .head import OutputHead, read_head
from .products import fast_products
from .section import Section


@contextlib.contextmanager
def opened(
    found: ModelLayout, call: nn.Module, arguments: dict[str, Any]
) -> Iterator[tuple[OutputHead | None, Section]]:
    """The head and an open section of a model that is frozen already; the model is as it was afterwards.

    Args:
        found: the model's layout.
        call: what a run calls: the model, or its compiled wrapper, which brings products of its own.
        arguments: of a forward pass on a prompt or two, which the head is read from.
    """
    head = read_head(found.model, arguments)
    with contextlib.ExitStack() as stack:
        if call is found.model:
            stack.enter_context(fast_products(found.layers))
        yield head, stack.enter_context(Section(found, None if head is None else head.module, call))
