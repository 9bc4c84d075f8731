"""Before long work: verify the kernels of its device, once per machine."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .._log import notice
from ..ops import backends, device_identity, verdicts
from .verify import kernel_backends, verify_locked

#: The environment variable that decides, and its values.
VARIABLE = "ACTSCALE_VERIFY"
MODES = ("0", "1", "ask")
_tried: set[torch.device] = set()  # in this process


def ensure_verified(device: torch.device, *, progress: bool = True) -> None:
    """Verify the kernels of a device that has no verdict yet, so that "auto" can use them; takes a minute or two.

    The environment variable ACTSCALE_VERIFY decides: unset, the kernels of a GPU are verified (the C++ kernels are
    used without a verdict); "1": also those of a CPU; "0": none; "ask": a question in a terminal. Nothing happens where
    a backend was chosen by name or no kernel can run. A verification that cannot be made is a warning: plain PyTorch
    serves the ops then.

    Args:
        device: the model's device.
        progress: show a progress bar.

    Raises:
        ValueError: ACTSCALE_VERIFY has another value.
    """
    mode = os.environ.get(VARIABLE, "")
    if mode and mode not in MODES:
        raise ValueError(f"environment variable {VARIABLE}: got {mode!r}, expected one of {', '.join(MODES)}")
    wanted = device.type == "cuda" or (device.type == "cpu" and mode == "1")
    if not wanted or mode == "0" or backends.get_backend() != "auto":
        return
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device in _tried or _has_verdict(device) or not kernel_backends(device):
        return
    if mode == "ask" and not _agreed(device):
        return
    _verify_once(device, progress)


def _verify_once(device: torch.device, progress: bool) -> None:
    """One process verifies a kind of device; the others wait for its verdict."""
    _tried.add(device)
    try:
        with verdicts.locked(device_identity.identity(device)):
            backends.reconsider()
            if _has_verdict(device):
                return
            notice(f"verifying the kernels on {device} (once for this device and these versions; a minute or two)")
            with progress_bar(progress) as report:
                found = verify_locked(device, True, report)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f"the kernels on {device} could not be verified: {error}", RuntimeWarning, stacklevel=2)
        return
    for failure in found.failures:
        warnings.warn(f"a kernel did not pass verification on {device} and is not used: {failure}", stacklevel=2)


def _has_verdict(device: torch.device) -> bool:
    """A complete one: what could not be tested, for lack of memory perhaps, is tried again by the next process."""
    verdict = verdicts.load(device)
    return verdict is not None and bool(verdict["complete"])


def _agreed(device: torch.device) -> bool:
    return _answer(str(device)) if sys.stdin is not None and sys.stdin.isatty() else False


@functools.cache
def _answer(device: str) -> bool:
    """Asked once per process."""
    print(f"Verify the kernels of actscale_fast on {device} now (a minute or two)? [Y/n] ", end="", file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr for `verify_kernels`, in a terminal only."""
    from tqdm import tqdm

    with tqdm(total=100, desc="verify", leave=False, disable=not (shown and sys.stderr.isatty())) as bar:

        def report(share: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(round(100 * share) - bar.n)

        yield report
