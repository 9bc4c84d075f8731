"""`actscale-fast verify`: test the kernels on a device, time the backends, keep the verdict."""

from __future__ import annotations

import argparse

import torch

from .._json import encoded
from ..ops import verdicts
from ..verification.ensure import progress_bar
from ..verification.speed import COMPILED
from ..verification.verify import Verification, chosen_device, verify_kernels
from .output import print_table, say, show
from .verbosity import is_quiet


def verify(options: argparse.Namespace) -> int:
    """Verify (or, with --report, print the verdict that is there); status 1 where a kernel did not pass."""
    device = None if options.device == "auto" else options.device
    if options.report:
        return _report(chosen_device(device), options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with progress_bar(not is_quiet()) as report:
        found = verify_kernels(device, quick=not options.full, progress=report)
    options.result = found.verdict
    _print(found)
    say(f"verdict: {found.path}")
    return 0 if found.ok else 1


def _report(device: torch.device, options: argparse.Namespace) -> int:
    """The verdict as JSON, for a bug report."""
    verdict = verdicts.load(device)
    if verdict is None:
        raise FileNotFoundError(
            f"there is no verdict for {device} with these versions in {verdicts.folder()}; "
            f"`actscale-fast verify --device {device}` makes one"
        )
    options.result = verdict
    show(encoded(verdict).decode().rstrip())
    return 0


def _print(found: Verification) -> None:
    columns, rows = found.table()
    if rows:
        print_table(found._heading(), columns, rows, right=False)
    else:
        show(f"{found._heading()}: no kernel can run here, plain PyTorch serves every op")
    for note in found._notes():
        show(note)
    names = list(dict.fromkeys(name for one in found.verdict["times"] for name in one["times"]))
    times = [
        [one["op"], one["dtype"], one["size"], *(_time(one["times"].get(name)) for name in names)]
        for one in found.verdict["times"]
    ]
    if times:
        title = "µs per call with its gradients (middle 60 % of the samples)"
        print_table(title, ["op", "dtype", "size", *(_named(name) for name in names)], times)


def _named(name: str) -> str:
    return {"reference": "plain PyTorch", COMPILED: "torch.compile"}.get(name, name)


def _time(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    return f"{times['step']:,.0f} ({times['low']:,.0f}–{times['high']:,.0f})"
