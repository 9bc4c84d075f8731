"""Tells the table which tokens a forward pass of vLLM's V1 model runner holds.

`GPUModelRunner._prepare_inputs` is private. After it, the runner's `input_batch` has the requests in the order of their
tokens, with the number of tokens computed before; both are what vLLM computes positions from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from . import compatibility
from .plan import Plan
from .request_options import PLAN
from .worker_table import Span, WorkerTable


class PlanCache:
    """Decoded plans of the requests of the last passes."""

    def __init__(self) -> None:
        self._plans: dict[str, tuple[object, Plan | None]] = {}

    def of(self, requests: Mapping[str, Any]) -> dict[str, Plan | None]:
        """The plan of each request, by its id; `requests` holds their sampling parameters."""
        known, self._plans = self._plans, {}
        for request_id, params in requests.items():
            data = None if params is None else (params.extra_args or {}).get(PLAN)
            before = known.get(request_id)
            if before is None or before[0] is not data:
                before = (data, None if data is None else Plan.decode(data))
            self._plans[request_id] = before
        return {request_id: plan for request_id, (_, plan) in self._plans.items()}


def attach(runner: Any, table: WorkerTable) -> None:
    """Let the table follow the passes of a V1 model runner."""
    compatibility.require_signatures(compatibility.RUNNER_V1)
    prepare = runner._prepare_inputs
    cache = PlanCache()

    @functools.wraps(prepare)
    def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        table.assign(spans(runner, num_scheduled_tokens, cache))
        return prepared

    runner._prepare_inputs = _prepare_inputs


def spans(runner: Any, num_scheduled_tokens: Any, cache: PlanCache) -> list[Span]:
    """The tokens of the next forward pass, request by request."""
    batch = runner.input_batch
    ids = batch.req_ids[: batch.num_reqs]
    plans = cache.of({request_id: runner.requests[request_id].sampling_params for request_id in ids})
    starts = batch.num_computed_tokens_cpu[: len(ids)].tolist()
    counts = num_scheduled_tokens[: len(ids)].tolist()
    return [Span(plans[name], start, count) for name, start, count in zip(ids, starts, counts, strict=True)]
