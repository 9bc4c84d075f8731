"""Prometheus metrics in the registry that vLLM's /metrics shows.

Requests are counted where they are admitted, in the API server processes. With several of them vLLM sets
PROMETHEUS_MULTIPROC_DIR, through which prometheus_client adds their counts up. The workers are asked for the rows of
their tables by the endpoint plug-in when /metrics is read (endpoint.py).
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from .request_options import RequestOptions

#: How many requests this process has admitted, by intervention.
admitted: collections.Counter[str] = collections.Counter()


class Metrics(NamedTuple):
    """The metrics of one process."""

    steered: Any
    rows: Any
    rows_held: Any


@functools.cache
def metrics() -> Metrics:
    """The metrics of this process, registered when they are first asked for."""
    from prometheus_client import Counter, Gauge

    # Of several processes the latest value, since they all ask the same workers.
    gauge = functools.partial(Gauge, multiprocess_mode="mostrecent")
    return Metrics(
        Counter("actscale:steered_requests", "Requests admitted with an intervention.", ["intervention"]),
        gauge("actscale:table_rows", "Rows of parameters in each worker's table."),
        gauge(
            "actscale:table_rows_held",
            "Rows that hold parameters, in the fullest worker; the least recently used are overwritten.",
        ),
    )


def count_steered(options: RequestOptions) -> None:
    """Count an admitted request, once for each different intervention that it names."""
    for name in dict.fromkeys(options.names):
        admitted[name] += 1
        metrics().steered.labels(intervention=name).inc()


def show_tables(status: Sequence[dict[str, Any]]) -> None:
    """Set the gauges of the tables from the status of each worker."""
    if status:
        metrics().rows.set(min(worker["rows"] for worker in status))
        metrics().rows_held.set(max(worker["rows_held"] for worker in status))
