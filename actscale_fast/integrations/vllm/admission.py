"""Requests on their way into the engine: checked, resolved to a plan, and given a salt of the prefix cache.

`InputProcessor.process_inputs` is the one place that all requests pass, offline and over HTTP. What it raises as a
ValueError becomes HTTP 400. A guard in the engine refuses a request that has come another way.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

from . import configuration, dropped_arguments
from .plan import Plan
from .registry import Registry
from .request_options import NAME, PLAN, RequestOptions, mentions, parse
from .resolve import resolve
from .served_model import ServedModel
from .settings import FOLDER, Settings

#: Called with the options of each request that is admitted with a plan; for counting.
observers: list[Callable[[RequestOptions], None]] = []


class Admission:
    """Turns the options of requests into plans, for one engine.

    Args:
        registry: the interventions by name.
        served: the served model.
    """

    def __init__(self, registry: Registry, served: ServedModel) -> None:
        self.registry = registry
        self.served = served
        self._lock = threading.Lock()
        self.n_steered = 0

    def admit(self, request: Any, *, resumable: bool = False) -> None:
        """Attach a plan and a cache salt to an EngineCoreRequest that asks for an intervention.

        Raises:
            ValueError: the request asks for something that cannot be done.
        """
        params = request.sampling_params
        if params is None or not mentions(params.extra_args):
            return
        options = parse(params.extra_args)
        assert options is not None
        if resumable:
            raise ValueError(f"{NAME}: a session whose prompt is sent in pieces cannot be steered")
        length = _prompt_length(request)
        try:
            found = [self.registry.get(name).intervention for name in options.names]
        except (OSError, ValueError) as error:
            message = self.registry.public(error)
            raise ValueError(message if message.startswith(NAME) else f"{NAME}: {message}") from error
        plan = resolve(options, found, length, self.served)
        kept = {key: value for key, value in params.extra_args.items() if not mentions({key: value})}
        if plan is None:  # of strength 0, say: the same as a request without an intervention
            params.extra_args = kept or None
            return
        params.extra_args = {**kept, NAME: str(options), PLAN: plan.encoded()}
        request.cache_salt = salted(request.cache_salt, plan)
        with self._lock:
            self.n_steered += 1
        for observer in observers:
            observer(options)


def salted(client_salt: str | None, plan: Plan) -> str:
    """The salt of the prefix cache: what the client sent, joined with the plan."""
    return hashlib.sha256(f"{client_salt or ''}\0{plan.salt}".encode()).hexdigest()


def admission_of(engine: Any) -> Admission:
    """The admission of an LLM, an LLMEngine, an AsyncLLM or an InputProcessor.

    Raises:
        ValueError: the engine was started without interventions.
    """
    for path in ("", "input_processor", "llm_engine.input_processor"):
        found = engine
        for part in filter(None, path.split(".")):
            found = getattr(found, part, None)
        admission = getattr(found, "_actscale_admission", None)
        if isinstance(admission, Admission):
            return admission
    raise ValueError(f"engine: got a {type(engine).__name__} that was started without {FOLDER}")


def registry_of(engine: Any) -> Registry:
    """The interventions by name of an LLM, an LLMEngine, an AsyncLLM or an InputProcessor."""
    return admission_of(engine).registry


def require_plan(request: Any) -> None:
    """Raise a ValueError for a request that asks for an intervention but has no plan, because it came another way."""
    params = request.sampling_params
    if params is not None and mentions(params.extra_args) and PLAN not in params.extra_args:
        raise ValueError(
            f"{NAME}: the request {request.request_id} did not pass vLLM's InputProcessor, so it cannot be steered"
        )


def _prompt_length(request: Any) -> int:
    ids, embeds = request.prompt_token_ids, request.prompt_embeds
    return len(ids) if ids is not None else len(embeds)


def install() -> None:
    """Wrap vLLM's methods in a process that takes requests or runs an engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    create, init = EngineArgs.create_engine_config, InputProcessor.__init__
    process, preprocess = InputProcessor.process_inputs, EngineCore.preprocess_add_request

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = create(self, *args, **kwargs)
        settings = Settings.from_environment()
        if settings is not None:
            dropped_arguments.install(registry_of)
            configuration.configure(vllm_config, settings)
        return vllm_config

    @functools.wraps(init)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, vllm_config, *args, **kwargs)
        served, settings = ServedModel.of_config(vllm_config), Settings.from_environment()
        if served is not None and settings is not None:
            self._actscale_admission = Admission(Registry(settings.folder, served), served)

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        request = process(self, *args, **kwargs)
        admission = getattr(self, "_actscale_admission", None)
        if admission is not None:
            try:
                admission.admit(request, resumable=request.resumable)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
        return request

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        require_plan(request)
        return preprocess(self, request)

    EngineArgs.create_engine_config = create_engine_config
    InputProcessor.__init__ = __init__
    InputProcessor.process_inputs = process_inputs
    EngineCore.preprocess_add_request = preprocess_add_request
