"""Damages saved files and kills the processes that write them, and counts what comes of it.

    PYTHONPATH=tests/helpers python tests/helpers/damage.py --corruptions 5000 --kills 200

A corruption flips bits, truncates, removes, inserts or repeats bytes, deletes a file or replaces it by one of another
save. Reading must then give what was written (the damage touched nothing that is used), or raise a ValueError or
FileNotFoundError that names a file of the damaged folder. A kill is SIGKILL for a process that keeps saving over an
older save.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_zoo import randomised, tiny_model

import actscale_fast as af
from actscale_fast.das.boundless_das import BoundlessDAS
from actscale_fast.interventions import Intervention
from actscale_fast.learning import checkpoint
from actscale_fast.learning.evaluate import Evaluation
from actscale_fast.learning.sweep import fit_folder, folder as sweep_files
from actscale_fast.learning.sweep.result import SweepFit, SweepResult
from actscale_fast.patching.pretrained import ActScaleModel

#: State of a fit, in the checkpoints that are damaged.
SETTINGS = {"lr": 0.05, "location": {"site": "head", "layers": [0, 1]}}


@dataclass
class Kind:
    """Something that is written and read back."""

    name: str
    write: Callable[[Path, int], None]  # into a folder, one of several contents
    read: Callable[[Path], Any]  # what it holds, to be compared
    kept: bool = False  # never saved over


def interventions(number: int) -> dict[str, Intervention]:
    """One intervention of each kind of file, with values of their own for each number."""
    model = tiny_model("llama")
    scalars = randomised(af.ActivScalar.for_model(model, positions=[0, -1], generated=True), 10 * number + 1)
    vector = randomised(af.SteerVec.for_model(model, site="attn_out", layers=[number % 2]), 10 * number + 2)
    probes = randomised(af.Projection.for_model(model, site="residual"), 10 * number + 3)
    das = BoundlessDAS.for_model(model, site="residual", layers=[0], positions=[number, -1], seed=number)
    return {"ActivScalar": scalars, "SteerVec": vector, "Composite": scalars + 0.5 * probes + scalars, "DAS": das}


def contents(intervention: Intervention) -> Any:
    """All that decides what an intervention does."""
    told = []
    for factor, part in intervention.pairs:
        tensors = {name: value.detach().numpy().tobytes() for name, value in part.saved_tensors().items()}
        told.append((factor, type(part).__name__, part.location, part.n_groups, sorted(tensors.items())))
    return told


def state(number: int) -> checkpoint.SavedFit:
    generator = torch.Generator().manual_seed(number)
    tensors = {name: torch.randn(3, 4, 5, generator=generator) for name in ("alpha", "alpha.exp_avg")}
    history = [{"step": step, "loss": 0.1 * step + number, "lr": 0.05} for step in range(8)]
    return checkpoint.SavedFit(8, tensors | {"alpha.step": torch.tensor(8.0)}, history)


def write_state(folder: Path, number: int) -> None:
    """Fits of two seeds."""
    checkpoint.save(folder / "fit.safetensors", state(number), SETTINGS | {"seed": number})


def read_state(folder: Path, number: int = 0) -> Any:
    found = checkpoint.load(folder / "fit.safetensors", SETTINGS | {"seed": number}, state(0).tensors)
    if found is None:  # a fit begins anew
        raise FileNotFoundError(folder / "fit.safetensors")
    return found.step, found.history, {name: value.numpy().tobytes() for name, value in found.tensors.items()}


def write_sweep(root: Path, number: int) -> None:
    made = list(interventions(number).values())[:2]
    figures = Evaluation(7, 0.5 + 0.01 * number, 0.25, 1.0, -1.0, 0.3, 0.2, 0.4, 0.9, 3, 12, 1.5)
    fits = []
    for index, one in enumerate(made):
        history = [{"step": step, "loss": 1.0 / (step + 1 + index + number)} for step in range(4)]
        told = {"minimality": 0.1 * index}
        fits.append(SweepFit(f"fit {index}", told, None, {"lr": 0.05}, one, history, f"fit-{index}", figures))
        fit_folder.write_finished(root, fits[-1])
        fit_folder.write_evaluation(root, fits[-1], "of these examples")
    sweep_files.write_index(root, SweepResult(fits, 0.0))


def read_sweep(root: Path) -> Any:
    result = []
    for fit in sweep_files.load_sweep(root).fits:
        kept = fit_folder.read_evaluation(root, fit, "of these examples")
        told = (fit.label, fit.chosen, fit.task, fit.settings, fit.history, fit.folder, fit.error)
        result.append((told, fit.evaluation, kept, contents(fit.intervention)))
    return result


def kinds() -> list[Kind]:
    def saved(name: str) -> Callable[[Path, int], None]:
        return lambda folder, number: interventions(number)[name].save_pretrained(folder)

    def adapted(folder: Path, number: int) -> None:
        scalars = interventions(number)["ActivScalar"]
        ActScaleModel(tiny_model("llama"), scalars, strength=0.5 + number).save_pretrained(folder)

    def read_adapted(folder: Path) -> Any:
        found = ActScaleModel.from_pretrained(tiny_model("llama"), folder)
        return found.strength, contents(found.intervention)

    return [
        *[Kind(name, saved(name), lambda folder: contents(af.load_intervention(folder))) for name in interventions(0)],
        Kind("checkpoint", write_state, read_state),
        Kind("sweep", write_sweep, read_sweep, kept=True),  # finished fits stay
        Kind("ActScaleModel", adapted, read_adapted),
    ]


def corrupt(folder: Path, other: Path, rng: random.Random) -> str:
    """Damage one file of a folder; `other` is another save of its kind. What was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    how = rng.choice(("bit", "byte", "cut", "append", "remove", "insert", "repeat", "zeros", "lost", "swap", "digit"))
    if how == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "byte":
        content[at] = (content[at] + rng.randrange(1, 256)) % 256
    elif how == "cut":
        del content[at:]
    elif how == "append":
        content += bytes([rng.randrange(256)]) * rng.choice((1, 1, 100))
    elif how == "remove":
        del content[at : at + rng.choice((1, 2, 30))]
    elif how == "insert":
        content[at:at] = rng.randbytes(rng.choice((1, 2, 30)))
    elif how == "repeat":
        content[at:at] = content[max(at - 40, 0) : at + 1]
    elif how == "zeros":
        end = min(at + 512, len(content))
        content[at:end] = bytes(end - at)
    elif how == "digit":  # JSON stays JSON, and numbers numbers
        digits = [index for index, byte in enumerate(content) if 48 <= byte < 58]
        if digits:
            index = rng.choice(digits)
            content[index] = 48 + (content[index] - 48 + rng.randrange(1, 10)) % 10
    elif how == "lost":
        path.unlink()
        return f"{path.relative_to(folder)}: lost"
    else:
        there = sorted(place for place in (folder, other) for place in place.rglob(f"*{path.suffix}"))
        content = bytearray(rng.choice([place for place in there if place.is_file()]).read_bytes())
    path.write_bytes(content)
    return f"{path.relative_to(folder)}: {how} at {at}"


def corruptions(count: int, seed: int, folder: Path) -> Counter[str]:
    """How many corruptions were found, touched nothing, were silent, or raised an error that names no file."""
    rng, found = random.Random(seed), Counter[str]()
    every = kinds()
    for index, kind in enumerate(every):
        sources = []
        for number in (0, 1):
            sources.append(folder / f"{kind.name}-{number}")
            kind.write(sources[-1], number)
        expected = kind.read(sources[0])
        whole = {path: path.read_bytes() for path in sources[0].rglob("*") if path.is_file()}
        for _ in range(count // len(every) + (index < count % len(every))):
            place = folder / "damaged"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(sources[0], place)
            what = f"{kind.name}: {corrupt(place, sources[1], rng)}"
            before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
            if before == {place / path.relative_to(sources[0]): value for path, value in whole.items()}:
                found["no change after all"] += 1  # exchanged for the same, no digit to change
                continue
            verdict = _verdict(lambda kind=kind, place=place: kind.read(place), expected, place)  # type: ignore[misc]
            if before != {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}:
                verdict = "unnamed: reading changed the folder"
            found[verdict.partition(":")[0]] += 1
            if verdict.startswith(("silent", "unnamed")):
                print(f"{what} (seed {seed}): {verdict}", file=sys.stderr)
    return found


def _verdict(read: Callable[[], Any], expected: Any, place: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = read()
    except (ValueError, FileNotFoundError) as error:
        named = str(place) in str(error) and any(end in str(error) for end in (".json", ".safetensors"))
        return "found" if named else f"unnamed: {error!r}"
    except Exception as error:
        return f"unnamed: {error!r}"
    return "untouched" if result == expected else "silent"


def kills(count: int, seed: int, folder: Path) -> Counter[str]:
    """How many of `count` killed savers left the old save or the new one; the rest lost both."""
    rng, found = random.Random(seed), Counter[str]()
    every = [kind for kind in kinds() if not kind.kept]
    wholes = {}
    for kind in every:
        wholes[kind.name] = []
        for number in (0, 1):
            kind.write(folder / f"whole-{kind.name}-{number}", number)
            wholes[kind.name].append(_read(kind, folder / f"whole-{kind.name}-{number}"))
    for index in range(count):
        kind = every[index % len(every)]
        place = folder / f"killed-{kind.name}"
        kind.write(place, 1)
        process = _saving(kind, place)
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        lost = _read(kind, place) not in wholes[kind.name]
        temporaries = [path for path in place.rglob(".*") if path.is_file()]
        kind.write(place, 0)
        stale = [path for path in place.rglob("*") if path not in _after_one_save(kind, place, folder)]
        found["lost" if lost else "whole"] += 1
        found["in the middle of a file"] += bool(temporaries)
        if stale or _read(kind, place) != wholes[kind.name][0]:
            found["not cleaned up"] += 1
        if lost or stale:
            print(f"{kind.name} (seed {seed}, kill {index}): {_read(kind, place)!r:.300}, {stale}", file=sys.stderr)
    return found


def _saving(kind: Kind, place: Path) -> int:
    """A process that saves over and over again."""
    process = os.fork()
    if process:
        return process
    with contextlib.suppress(BaseException):
        torch.set_num_threads(1)
        for number in itertools.count():
            kind.write(place, number % 2)
    os._exit(1)


def _after_one_save(kind: Kind, place: Path, folder: Path) -> set[Path]:
    """The files that a save into an empty folder leaves."""
    whole = folder / f"whole-{kind.name}-0"
    return {place / path.relative_to(whole) for path in whole.rglob("*")}


def _read(kind: Kind, place: Path) -> Any:
    """What is read; a checkpoint of either fit."""
    try:
        if kind.read is read_state:
            with contextlib.suppress(ValueError):
                return read_state(place, 1)
        return kind.read(place)
    except (ValueError, OSError) as error:
        return repr(error)


def main() -> None:
    parser = argparse.ArgumentParser(description="damage files, kill their writers, count what is lost or silent")
    parser.add_argument("--corruptions", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(f"corruptions: {dict(corruptions(options.corruptions, options.seed, Path(name)))}", flush=True)
        print(f"kills: {dict(kills(options.kills, options.seed, Path(name)))}")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
