"""Tells the table which tokens a forward pass of vLLM's V2 model runner holds.

Written against `DefaultModelState` and `InputBatch` and tested with stand-ins of these. The V2 runner is vLLM's default
on GPUs; **this file has not been run on one.**
"""

from __future__ import annotations

import functools
from typing import Any

from . import compatibility
from .plan import Plan
from .request_options import PLAN
from .worker_table import Span, WorkerTable


def attach(runner: Any, table: WorkerTable) -> None:
    """Let the table follow the passes of a V2 model runner.

    Raises:
        ValueError: a model state or a feature for which the order of the tokens is not known.
    """
    compatibility.require_signatures(compatibility.RUNNER_V2)
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    state = runner.model_state
    if type(state) is not DefaultModelState:
        raise ValueError(f"actscale_fast: a model state of the type {type(state).__name__} is not known")
    if getattr(runner, "adaptive_verification", None) is not None:
        raise ValueError("actscale_fast: adaptive verification drops tokens in an order that is not known here")
    follow(state, table)


def follow(state: Any, table: WorkerTable) -> None:
    """Wrap the three methods of a model state by which requests come, go and run."""
    add, remove, prepare = state.add_request, state.remove_request, state.prepare_inputs
    plans: dict[str, Plan] = {}

    @functools.wraps(add)
    def add_request(req_index: int, new_req_data: Any) -> Any:
        params = new_req_data.sampling_params
        data = None if params is None else (params.extra_args or {}).get(PLAN)
        plans.pop(new_req_data.req_id, None)
        if data is not None:
            plans[new_req_data.req_id] = Plan.decode(data)
        return add(req_index, new_req_data)

    @functools.wraps(remove)
    def remove_request(req_id: str) -> Any:
        plans.pop(req_id, None)
        return remove(req_id)

    @functools.wraps(prepare)
    def prepare_inputs(input_batch: Any, req_states: Any) -> Any:
        table.assign(spans(input_batch, plans))
        return prepare(input_batch, req_states)

    state.add_request, state.remove_request, state.prepare_inputs = add_request, remove_request, prepare_inputs


def spans(batch: Any, plans: dict[str, Plan]) -> list[Span]:
    """The tokens of the next forward pass, request by request."""
    n = batch.num_reqs
    starts, counts = batch.num_computed_tokens_np[:n].tolist(), batch.num_scheduled_tokens[:n].tolist()
    return [
        Span(plans.get(name), start, count)
        for name, start, count in zip(batch.req_ids[:n], starts, counts, strict=True)
    ]
