"""What the process that starts an engine adds to vLLM's configuration."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..._log import logger
from . import compatibility
from .registry import Entry, Registry
from .served_model import KEY, ServedModel
from .settings import FOLDER, SERVED_KINDS, Settings

#: Rows per request where only scalars are served, which take little memory.
_SCALAR_ROWS = 8
_PACKAGE = Path(__file__).resolve().parents[2]
#: What is compiled into the model's graphs.
_COMPILED = (
    "integrations/_token_rows.py",
    "integrations/vllm/steered_attention.py",
    *(f"ops/{name}.py" for name in ("scale_heads", "dynamic_scale", "checks", "outputs", "registry", "backends")),
)


def configure(vllm_config: Any, settings: Settings) -> ServedModel:
    """Check an engine's configuration and the folder, and write down what is served.

    Raises:
        ValueError, OSError: a setting that is refused, or a folder with an intervention that cannot be served.
    """
    compatibility.require_features(vllm_config)
    shape = _shape(vllm_config.model_config)
    everything = ServedModel(**shape, kinds=SERVED_KINDS, rows_per_request=1, sources=sources())
    registry = Registry(settings.folder, everything)
    registry.check_names()
    entries = registry.entries()
    found = {kind for entry in entries for kind in entry.kinds}
    kinds = settings.kinds or tuple(kind for kind in SERVED_KINDS if kind in found | {"ActivScalar"})
    if missing := sorted(found - set(kinds)):
        raise ValueError(f"ACTSCALE_KINDS: got {', '.join(kinds)}, but {settings.folder} holds {', '.join(missing)}")
    served = ServedModel(
        **shape, kinds=kinds, rows_per_request=settings.rows_per_request or _rows(kinds, entries), sources=sources()
    )
    if needed := [entry for entry in entries if entry.n_rows > served.rows_per_request]:
        raise ValueError(
            f"ACTSCALE_ROWS_PER_REQUEST: got {served.rows_per_request}, but {needed[0].name!r} needs {needed[0].n_rows}"
        )
    if not entries:
        logger.warning("%s=%s holds no intervention yet", FOLDER, settings.folder)
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: served.to_dict()}
    return served


def _rows(kinds: tuple[str, ...], entries: list[Entry]) -> int:
    return max([_SCALAR_ROWS if kinds == ("ActivScalar",) else 1, *(entry.n_rows for entry in entries)])


def _shape(model: Any) -> dict[str, Any]:
    config = model.hf_text_config
    types = dict.fromkeys(str(getattr(one, "model_type", "")) for one in (config, model.hf_config))
    return {
        "name": str(model.model),
        "model_types": tuple(types),
        "n_layers": int(model.get_total_num_hidden_layers()),
        "n_heads": int(config.num_attention_heads),
        "head_dim": int(model.get_head_size()),
        "hidden_size": int(model.get_hidden_size()),
    }


def sources() -> str:
    """A digest of the sources that are compiled into the model's graphs, and of the package's version."""
    from ..._version import __version__

    digest = hashlib.sha256(__version__.encode())
    for name in _COMPILED:
        digest.update((_PACKAGE / name).read_bytes())
    return digest.hexdigest()[:16]
