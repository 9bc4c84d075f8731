"""A worker's table: rows of parameters in buffers of fixed addresses, and the row of each token of a forward pass.

Before each pass the table is told which requests take part. It writes the rows that it does not hold yet over rows that
no request of the pass uses. It has as many rows as all requests of one pass can need, so it never runs out, and nothing
has to be told when a request ends, is aborted or preempted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .plan import NO_ROW, PARTS, Plan, Row
from .served_model import ServedModel
from .settings import VECTORS_AT_OUTPUT
from .steered_attention import LayerRows, OutputRows


class Span(NamedTuple):
    """Consecutive tokens of one request in a forward pass."""

    plan: Plan | None
    start: int  # the position of the first token in its sequence
    n_tokens: int


class WorkerTable:
    """The rows of the requests that run.

    Args:
        served: the model's shape and the kinds of interventions.
        heads: the heads of this rank.
        max_requests: the most requests in one forward pass.
        max_tokens: the most tokens in one forward pass, padding included.
        device: where the layers compute.
    """

    def __init__(
        self, served: ServedModel, heads: range, *, max_requests: int, max_tokens: int, device: torch.device
    ) -> None:
        self.served = served
        self.heads = heads
        self.n_rows = 1 + max_requests * served.rows_per_request  # row 0 is the identity
        layers, rows, n_heads, width = served.n_layers, self.n_rows, len(heads), served.head_dim

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.alpha = zeros(layers, rows, 1, n_heads)
        self.shift = zeros(layers, rows, 1, n_heads, width) if "SteerVec" in served.kinds else None
        self.probes = zeros(layers, rows, n_heads, width) if "DynScalar" in served.kinds else None
        # Whole, not this rank's part: it is added after the projection's results have been summed over the ranks.
        self.output = zeros(layers, rows, 1, 1, served.hidden_size) if VECTORS_AT_OUTPUT in served.kinds else None
        self.index = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._filled = 0  # tokens of the index that may not be 0
        self._row_of: dict[str, int] = {}  # in the order of their last use
        self._free = list(range(self.n_rows - 1, 0, -1))
        self.n_written = 0
        self._layers: dict[int, LayerRows] = {}
        self._outputs: dict[int, OutputRows] = {}

    def layer(self, number: int) -> LayerRows:
        """The part of one layer's heads, whose buffers share the table's memory."""
        alpha, shift, probes = self._parts(number)
        assert alpha is not None
        self._layers[number] = LayerRows(len(self.heads), self.index, alpha, shift, probes)
        return self._layers[number]

    def output_layer(self, number: int) -> OutputRows | None:
        """The part of one layer's projection; None: nothing is steered there."""
        if self.output is None:
            return None
        self._outputs[number] = OutputRows(self.index, self.output[number])
        return self._outputs[number]

    def assign(self, spans: Sequence[Span]) -> None:
        """Set the row of each token of the next forward pass; tokens beyond the spans use row 0.

        Args:
            spans: the tokens of the pass, in its order.
        """
        steered = [span for span in spans if span.plan is not None]
        if not steered and not self._filled:
            return
        self._require_shared()
        numbers = self._rows_of(row for span in steered for row in (span.plan.rows if span.plan else ()))
        total = sum(span.n_tokens for span in spans)
        if total > len(self.index):
            raise ValueError(f"spans: got {total} tokens, expected at most {len(self.index)}")
        filled = total if steered else 0
        changed = max(filled, self._filled)
        # New for each pass: the copy of the pass before may still wait behind its forward pass on the GPU. PyTorch does
        # not hand pinned memory out again before the copies from it are done.
        pinned = torch.zeros(changed, dtype=torch.int64, pin_memory=self.index.is_cuda)
        staged = pinned.numpy()
        at = 0
        for span in spans:
            if span.plan is not None:
                of_plan = np.array([numbers[row.key] for row in span.plan.rows] + [0], dtype=np.int64)
                assert NO_ROW == -1  # the last of these, the identity
                staged[at : at + span.n_tokens] = of_plan[span.plan.row_numbers(span.start, span.n_tokens)]
            at += span.n_tokens
        self.index[:changed].copy_(pinned, non_blocking=True)
        self._filled = filled

    def status(self) -> dict[str, Any]:
        """Numbers for a log or a metric."""
        return {
            "layers": self.served.n_layers,
            "heads": [self.heads.start, self.heads.stop],
            "head_dim": self.served.head_dim,
            "kinds": list(self.served.kinds),
            "rows": self.n_rows - 1,
            "rows_held": len(self._row_of),
            "rows_written": self.n_written,
            "tokens": len(self.index),
            "bytes": sum(
                part.nbytes
                for part in (self.alpha, self.shift, self.probes, self.output, self.index)
                if part is not None
            ),
        }

    def _rows_of(self, rows: Iterable[Row]) -> dict[str, int]:
        """The number of each row in the table; those that it does not hold yet are written."""
        wanted = {row.key: row for row in rows}
        if len(wanted) >= self.n_rows:
            raise ValueError(f"rows: got {len(wanted)}, expected at most {self.n_rows - 1}")
        for key in wanted:  # the last ones are not overwritten
            if key in self._row_of:
                self._row_of[key] = self._row_of.pop(key)
        missing = {key: row for key, row in wanted.items() if key not in self._row_of}
        for row in missing.values():  # before anything is overwritten
            self._require_room(row)
        for key, row in missing.items():
            number = self._free.pop() if self._free else self._row_of.pop(next(iter(self._row_of)))
            try:
                self._write(number, row)
            except BaseException:  # half written: no plan may find it
                self._free.append(number)
                raise
            self._row_of[key] = number
        return {key: self._row_of[key] for key in wanted}

    def _parts(self, number: int) -> list[Tensor | None]:
        return [None if part is None else part[number] for part in (self.alpha, self.shift, self.probes)]

    def _require_shared(self) -> None:
        """Raise a RuntimeError where a layer no longer reads the table, because vLLM has replaced its buffers."""
        pairs: list[tuple[int, Tensor | None, Tensor | None]] = [
            (number, buffer, part)
            for number, layer in self._layers.items()
            for buffer, part in zip(
                [layer.index, layer.alpha, layer.shift, layer.probes], [self.index, *self._parts(number)], strict=True
            )
        ]
        for number, projection in self._outputs.items():
            assert self.output is not None
            pairs += [(number, projection.index, self.index), (number, projection.output, self.output[number])]
        for number, buffer, part in pairs:
            if buffer is not None and part is not None and buffer.data_ptr() != part.data_ptr():
                raise RuntimeError(
                    f"actscale_fast: the buffers of layer {number} were replaced, as a reload of weights may do; "
                    "requests can no longer be steered: start the server again"
                )

    def _require_room(self, row: Row) -> None:
        """Raise a ValueError for a row that the table cannot hold."""
        served = self.served
        heads = (served.n_layers, served.n_heads)
        for name, part, shape in (
            ("alpha", self.alpha, heads),
            ("shift", self.shift, (*heads, served.head_dim)),
            ("probes", self.probes, (*heads, served.head_dim)),
            ("output", self.output, (served.n_layers, served.hidden_size)),
        ):
            values = getattr(row, name)
            if values is not None and part is None and values.any():
                raise ValueError(f"row: it holds {PARTS[name]}, for which the table has no room")
            if values is not None and part is not None and values.shape != shape:
                raise ValueError(f"row: {name} has the shape {list(values.shape)}, expected {list(shape)}")

    def _write(self, number: int, row: Row) -> None:
        own = slice(self.heads.start, self.heads.stop)
        self.alpha[:, number, 0] = self._tensor(row.alpha[:, own])
        shift, probes, output = row.shift, row.probes, row.output
        for part, values in (
            (self.shift, None if shift is None else shift[:, None, own]),
            (self.probes, None if probes is None else probes[:, own]),
            (self.output, None if output is None else output[:, None, None]),
        ):
            if part is None:
                continue
            if values is None:
                part[:, number].zero_()
            else:
                part[:, number].copy_(self._tensor(values))
        self.n_written += 1

    def _tensor(self, values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(self.alpha.device)
