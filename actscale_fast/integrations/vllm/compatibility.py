"""What the plug-in needs of vLLM: its version, the signatures of what is wrapped or read, and features that it refuses.

Everything here is checked when an engine starts. What is not recognised is refused then, because the alternative would
be fluent answers of the unsteered model under the name of an intervention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

#: The versions of vLLM that the plug-in is tested with.
SUPPORTED = ">=0.32,<0.33"


class Wrapped(NamedTuple):
    """A method of vLLM that the plug-in wraps or calls, and its parameters."""

    module: str
    name: str
    parameters: tuple[str, ...]
    #: Whether vLLM may have added further parameters at the end.
    open_ended: bool = False


#: In the processes that take requests, and in the engine's.
ADMISSION = (
    Wrapped("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self", "usage_context", "headless")),
    Wrapped("vllm.v1.engine.input_processor", "InputProcessor.__init__", ("self", "vllm_config", "renderer"), True),
    Wrapped(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request",
         "tokenization_kwargs", "trace_headers", "priority", "data_parallel_rank", "resumable"),
        True,
    ),
    Wrapped("vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "request")),
    Wrapped("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", ("self",)),
)  # fmt: skip

#: In the processes that answer HTTP requests.
HTTP = (
    Wrapped("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model", ("self", "request")),
    Wrapped("vllm.entrypoints.launchers.app", "init_entrypoints_middleware", ("args", "app", "supported_tasks")),
)

#: In workers.
ATTENTION = (
    Wrapped(
        "vllm.model_executor.layers.attention.attention",
        "Attention.forward",
        ("self", "query", "key", "value", "output_shape", "output_dtype"),
    ),
)
RUNNER_V1 = (
    Wrapped(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
)
RUNNER_V2 = (
    Wrapped(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.add_request",
        ("self", "req_index", "new_req_data"),
    ),
    Wrapped("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.remove_request", ("self", "req_id")),
    Wrapped(
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.prepare_inputs",
        ("self", "input_batch", "req_states"),
    ),
)


def require_version(version: str) -> None:
    """Raise an ImportError for a version of vLLM that is not supported."""
    if not SpecifierSet(SUPPORTED).contains(Version(version).base_version, prereleases=True):
        raise ImportError(f"actscale_fast.integrations.vllm: got vLLM {version}, expected vllm{SUPPORTED}")


def require_signatures(wrapped: tuple[Wrapped, ...]) -> None:
    """Raise an ImportError where a method is missing or takes other parameters than expected."""
    for one in wrapped:
        found = _parameters(function_of(one))
        kept = found[: len(one.parameters)] if one.open_ended else found
        if kept != one.parameters:
            raise ImportError(
                f"actscale_fast.integrations.vllm: {one.module}.{one.name} takes {', '.join(found)}, expected "
                f"{', '.join(one.parameters)}; this build of vLLM is not one that the plug-in knows"
            )


def function_of(one: Wrapped) -> Callable[..., Any]:
    """The method itself, without the wrapper of this package."""
    module = __import__(one.module, fromlist=["_"])
    found: Any = module
    for part in one.name.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise ImportError(
                f"actscale_fast.integrations.vllm: {one.module} has no {one.name}; this build of vLLM is not one that "
                "the plug-in knows"
            )
    return inspect.unwrap(found)  # type: ignore[no-any-return]


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def require_features(vllm_config: Any) -> None:
    """Raise a ValueError that names every setting of the server with which steering has not been shown to be right."""
    reasons = list(_refused(vllm_config))
    if reasons:
        raise ValueError(
            "actscale_fast: ACTSCALE_INTERVENTIONS is set, but requests cannot be steered with these settings: "
            + "; ".join(reasons)
        )


def _refused(config: Any) -> Iterator[str]:
    parallel, model = config.parallel_config, config.model_config
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism (it has not been run)"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "context parallelism (its ranks hold other tokens than the table expects)"
    if parallel.use_ubatching:
        yield "microbatches (their second half would use the rows of the first)"
    if str(parallel.distributed_executor_backend) not in ("None", "uni", "mp"):
        yield (
            f"the executor {parallel.distributed_executor_backend!r} (expected uni or mp: it is not certain that its "
            "processes load the plug-in)"
        )
    if model.enable_sleep_mode:
        yield "sleep mode (it discards the table)"
    if model.runner_type != "generate":
        yield f"the runner {model.runner_type!r} (only generation is steered)"
    if model.is_encoder_decoder:
        yield "an encoder and decoder (cross attention is not supported)"
    if getattr(model, "is_diffusion", False):
        yield "a diffusion model (its tokens have no fixed positions)"
    if config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill (later layers see other tokens than the table expects)"
    if config.kv_transfer_config is not None:
        yield "KV transfer (it has not been run)"
    if config.lora_config is not None:
        yield "LoRA (it has not been run)"
    if not isinstance(config.additional_config, dict):
        yield "an additional_config that is not a dictionary"
