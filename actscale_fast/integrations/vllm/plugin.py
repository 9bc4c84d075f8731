"""The entry point of the group `vllm.general_plugins`, which vLLM calls first in each of its processes."""

from __future__ import annotations

import os
import sys

from .settings import FOLDER

_registered = False


def register() -> None:
    """Wrap what the plug-in needs of vLLM, once per process; does nothing where no folder of interventions is set.

    Raises:
        ImportError: a version or a build of vLLM that the plug-in does not know.
        ValueError: a setting has a value that it cannot have.
    """
    global _registered
    if _registered or not os.environ.get(FOLDER, "").strip() or _only_inspects_a_model():
        return
    import vllm

    from . import admission, compatibility, metrics, worker
    from .settings import Settings

    Settings.from_environment()
    compatibility.require_version(vllm.__version__)
    compatibility.require_signatures(compatibility.ADMISSION)
    admission.install()
    admission.observers.append(metrics.count_steered)
    worker.install()
    _registered = True


def is_registered() -> bool:
    """Whether vLLM has called `register` in this process, with a folder of interventions set."""
    return _registered


def _only_inspects_a_model() -> bool:
    """Whether this is the process in which vLLM imports a model's class to ask it about itself."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) == "vllm.model_executor.models.registry"
