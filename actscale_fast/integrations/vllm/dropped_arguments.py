"""HTTP requests whose `actscale…` keys vLLM would drop on the way are refused, not answered by the unsteered model.

All routes that generate ask `BaseServing._check_model` first. What it returns is the answer, here HTTP 400. Fields that
a route drops without a trace are found before it, by `misplaced_options`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from . import compatibility
from .misplaced_options import RefuseMisplaced
from .registry import Registry
from .request_options import NAME, mentions, parse
from .unread_options import why_unread

#: The handlers that make sampling parameters of their own, from requests that have no field `vllm_xargs`.
_WITHOUT_ARGUMENTS = {
    "ServingGenerativeScoring": "generative scoring",
    "ServingStructuredDecisions": "a structured decision",
}


def install(registry_of: Callable[[Any], Registry]) -> None:
    """Wrap vLLM's check of a request's model, and what adds its middleware, once per process.

    Args:
        registry_of: the interventions by name of an engine.
    """
    compatibility.require_signatures(compatibility.HTTP)
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.serve.engine.serving import BaseServing

    check, add_middleware = BaseServing._check_model, launcher.init_entrypoints_middleware
    if hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    async def _check_model(self: Any, request: Any) -> Any:
        reason = why_dropped(type(self).__name__, request)
        if reason is not None:
            return self.create_error_response(reason)
        if names := _named(request):
            with contextlib.suppress(ValueError):  # an engine that was started without interventions
                await registry_of(getattr(self, "engine_client", None)).prepare(names)
        return await check(self, request)

    @functools.wraps(add_middleware)
    def init_entrypoints_middleware(args: Any, app: Any, supported_tasks: Any) -> None:
        app.add_middleware(RefuseMisplaced)  # before vLLM's own, so that it comes behind the check of the API key
        add_middleware(args, app, supported_tasks)

    BaseServing._check_model = _check_model
    launcher.init_entrypoints_middleware = init_entrypoints_middleware


def _named(request: Any) -> tuple[str, ...]:
    """The interventions that a request names; none where something is wrong with it, which its admission will tell."""
    arguments = getattr(request, "vllm_xargs", None)
    if arguments is None:
        arguments = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    try:
        options = parse(arguments) if isinstance(arguments, dict) else None
    except ValueError:
        return ()
    return () if options is None else options.names


def why_dropped(handler: str, request: Any) -> str | None:
    """Why vLLM would not hand a request's options on; None: it does, or there are none.

    Args:
        handler: the name of the class that answers the request.
        request: the request, a pydantic model that keeps unknown fields.
    """
    unknown = getattr(request, "model_extra", None) or {}
    known = {key: value for key, value in getattr(request, "__dict__", {}).items() if isinstance(value, dict)}
    if reason := why_unread({**known, **unknown}):
        return reason
    arguments = getattr(request, "vllm_xargs", None)
    if not isinstance(arguments, dict) or not mentions(arguments):
        return None
    way = "a beam search" if getattr(request, "use_beam_search", False) else _WITHOUT_ARGUMENTS.get(handler)
    return way and f"{NAME}: {way} cannot be steered, since vLLM drops the request's extra arguments"
