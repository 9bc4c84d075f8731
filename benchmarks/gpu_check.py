"""Everything that needs a GPU, in one run of ten minutes at most: `make gpu-check`.

Each part has a time-out of its own, so that a hang costs the others nothing: verification of the kernels, the tests
that need a GPU, compute-sanitizer on the CUDA kernels, and the harness. The outcome is one small JSON file. With
`--device cpu` the same parts run as far as they go without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .machine import ROOT, environment, slug
from .results import FOLDER

#: Lines of a part's output that are kept.
KEPT_LINES = 12
#: The harness's cases, the most telling first.
CASES = ("loss", "scale_heads", "linear", "dynamic_scale", "kl_div", "fit", "sweep")
#: What compute-sanitizer runs: the cases of these ops on the CUDA backend, in verification's worker.
SANITIZED_CASES = 12
SANITIZED, WORKER = ("scale_heads", "dynamic_scale", "intervention_loss"), "actscale_fast.verification.worker"


@dataclass(frozen=True)
class Part:
    """A command with its time-out; `stdin` is written to it."""

    name: str
    command: Sequence[str]
    seconds: float
    stdin: str = ""


def parts(device: str, out: Path) -> list[Part]:
    """The parts in their order."""
    python = sys.executable
    # The installed package, with its compiled kernels, not the sources of the checkout.
    installed = [python, "-P", "-m"]
    verify = [*installed, "actscale_fast.cli", "verify", "--device", device, "--json"]
    tests = [*installed, "pytest", "-q", "-m", "gpu", "-n", "0", "--tb=short", str(ROOT / "tests")]
    found = [Part("verify", verify, 120), Part("tests", tests, 120)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and device.startswith("cuda"):
        jobs = [["cuda", op, "bfloat16"] for op in SANITIZED]
        request = {"device": device, "jobs": jobs, "times": [], "quick": True, "cases": SANITIZED_CASES}
        request["watched"] = False  # its stdin closes at once
        for tool in ("memcheck", "racecheck"):
            worker = [sanitizer, "--tool", tool, "--error-exitcode", "9", *installed, WORKER]
            found.append(Part(f"compute-sanitizer {tool}", worker, 45, json.dumps(request) + "\n"))
    for case in CASES:
        harness = [python, "-m", "benchmarks", "--case", case, "--quick", "--device", device, "--out", str(out)]
        found.append(Part(f"harness {case}", harness, 35))
    return found


def run(part: Part) -> dict[str, object]:
    """The outcome of a part: "ok", "failed" or "timed out", seconds, and the last lines of its output."""
    started = time.perf_counter()
    # The harness is found in the working directory, where Python does not look with this variable.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    process = subprocess.Popen(
        list(part.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=environ, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(part.stdin, timeout=part.seconds)
        status = "ok" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its own workers
        status, output = "timed out", process.communicate()[0]
    seconds = round(time.perf_counter() - started, 1)
    return {"part": part.name, "status": status, "seconds": seconds, "output": output.splitlines()[-KEPT_LINES:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; status 1 where one of them failed, 2 without the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: what runs without a GPU")
    parser.add_argument("--out", type=Path, default=FOLDER / "gpu_check", help="folder of the JSON files")
    parser.add_argument("--only", action="append", metavar="TEXT", help="parts whose name contains this")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu-check: PyTorch finds no GPU here; `--device cpu` runs what needs none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, object] = {"environment": environment(device), "parts": []}
    outcomes: list[dict[str, object]] = []
    for part in parts(options.device, options.out):
        if options.only and not any(text in part.name for text in options.only):
            continue
        outcome = run(part)
        outcomes.append(outcome)
        print(f"{part.name}: {outcome['status']} in {outcome['seconds']} s", flush=True)
        record["parts"] = outcomes
        path = options.out / f"gpu-check-{slug(device, torch.get_num_threads())}.json"
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # after each part: what came so far
    return 1 if any(outcome["status"] != "ok" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
