"""The entry point of the group `vllm.logits_processors`: a processor that leaves logits alone and checks requests.

vLLM calls `validate_params` for each request, whether or not the rest of the plug-in is active, so that a request that
names an intervention is refused by a server that would not steer it.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from .plugin import is_registered
from .request_options import NAME, mentions, parse
from .settings import FOLDER

_V2 = "vllm.v1.worker.gpu.sample.logits_processor.interface"


class _RequestCheck(LogitsProcessor):  # type: ignore[misc]
    """Checks the options of requests; serves the V1 model runner and, by `register`, the V2 runner."""

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        from .served_model import ServedModel

        if ServedModel.of_config(vllm_config) is not None and not is_registered():
            raise RuntimeError(
                f"actscale_fast: the engine was started with {FOLDER}, but the plug-in is not active in this process; "
                "was VLLM_PLUGINS set, or the environment not handed on?"
            )

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if not mentions(sampling_params.extra_args):
            return
        if not is_registered():
            raise ValueError(
                f"{NAME}: no interventions are loaded: the server was started without {FOLDER}, or VLLM_PLUGINS leaves "
                "the plug-in out"
            )
        parse(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing to keep (V1)."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """This processor changes no logits (V2)."""
        return False

    def apply_staged_writes(self) -> None:
        """Nothing to write (V2)."""

    def apply(self, logits: Any, *rest: Any) -> Any:
        return logits


def __getattr__(name: str) -> Any:
    # vLLM looks the class up when an engine starts. The V2 runner accepts only classes of its own interface.
    if name != "RequestCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (interface := sys.modules.get(_V2)) is not None:
        interface.LogitsProcessor.register(_RequestCheck)
    return _RequestCheck
