"""Tokens per second of vLLM: without the plug-in, with it, steered, merged, and vllm-lens, in turns in one run.

    python -m benchmarks.vllm_throughput --model MODEL --intervention SAVED [--lens PYTHON] [--eager]

Run it in an environment with vLLM. Each engine lives in a process of its own; all are started first, and then take
turns, in a new order each round, so that a busy machine hits them alike. MODEL is a folder with a checkpoint. The
merged variant is the same checkpoint with the scalars written into its weights. `--lens` names the Python of an
environment that has vLLM and vllm-lens, which adds vectors to the residual stream and forces eager mode: other work,
for orientation.

Before anything is timed: the steered tokens must be those of the merged checkpoint, the unsteered ones of the plug-in
those of stock vLLM, and the two must differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .results import FOLDER

OUT = FOLDER / "vllm"
PROMPT_TOKENS, NEW_TOKENS, REQUESTS = 32, 24, 8
#: Name of a variant -> (kind of engine, what its requests ask for).
VARIANTS = {
    "stock vLLM": ("stock", None),
    "plug-in, unsteered": ("plug-in", None),
    "plug-in, all steered": ("plug-in", "one"),
    "plug-in, each its own strength": ("plug-in", "many"),
    "merged checkpoint, stock vLLM": ("merged", None),
}
LENS_VARIANTS = {"vllm-lens, unsteered": ("lens", None), "vllm-lens, all steered": ("lens", "lens")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--intervention", type=Path, required=True)
    parser.add_argument("--lens", help="the Python of an environment with vllm-lens")
    parser.add_argument("--eager", action="store_true", help="all engines without compilation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    record = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"throughput-{'eager' if options.eager else 'compiled'}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(record))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the engines, compare their tokens, and time them in turns."""
    from . import machine

    variants = VARIANTS | (LENS_VARIANTS if options.lens else {})
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        _prepare(options, folder)
        engines: dict[str, Engine] = {}
        try:
            for kind in dict.fromkeys(kind for kind, _ in variants.values()):
                engines[kind] = Engine(kind, options, folder)
                print(f"started: {kind}", file=sys.stderr, flush=True)
            tokens = {name: engines[kind].run(asked)["tokens"] for name, (kind, asked) in variants.items()}
            _compare(tokens)
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            rng = random.Random(0)
            for number in range(options.rounds):
                for name in rng.sample(list(variants), len(variants)):
                    kind, asked = variants[name]
                    seconds[name].append(engines[kind].run(asked)["seconds"])
                print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            versions = engines["stock"].versions | ({"vllm-lens": _lens_version(options.lens)} if options.lens else {})
        finally:
            for engine in engines.values():
                engine.close()
    import torch

    environment = machine.environment(torch.device("cpu"))
    environment["threads"] = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    environment["versions"] = {**environment["versions"], **versions}  # type: ignore[dict-item]
    return {
        "case": "vllm_throughput", "model": options.model.name, "eager": options.eager, "environment": environment,
        "requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rounds": options.rounds,
        "variants": [_figures(name, seconds) for name in variants],
    }  # fmt: skip


def _figures(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Tokens per second, and the ratio to stock vLLM of the same round, as medians with the lowest and highest."""
    rates = sorted(REQUESTS * NEW_TOKENS / own for own in seconds[name])
    ratios = sorted(stock / own for stock, own in zip(seconds["stock vLLM"], seconds[name], strict=True))
    return {
        "name": name,
        "tokens_per_second": [round(value, 1) for value in (statistics.median(rates), rates[0], rates[-1])],
        "of_stock": [round(value, 3) for value in (statistics.median(ratios), ratios[0], ratios[-1])],
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| | tokens/s | of stock vLLM |", "|---|---|---|"]
    for entry in record["variants"]:
        (rate, low, high), (ratio, least, most) = entry["tokens_per_second"], entry["of_stock"]
        lines.append(f"| {entry['name']} | {rate:g} ({low:g}–{high:g}) | {ratio:.2f} ({least:.2f}–{most:.2f}) |")
    return "\n".join(lines)


def _prepare(options: argparse.Namespace, folder: Path) -> None:
    """Save the scalars under a name, and the merged checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import actscale_fast as af
    from actscale_fast.interventions.named import add_named

    scalars = af.load_intervention(options.intervention)
    add_named(folder / "interventions", "scalars", scalars)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    af.merge(model, scalars)
    model.save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(options.model).save_pretrained(folder / "merged")


def _compare(tokens: dict[str, list[list[int]]]) -> None:
    """Raise a RuntimeError where a variant does not say what it must."""
    if tokens["plug-in, unsteered"] != tokens["stock vLLM"]:
        raise RuntimeError("the plug-in's unsteered tokens are not those of stock vLLM")
    if tokens["plug-in, all steered"] != tokens["merged checkpoint, stock vLLM"]:
        raise RuntimeError("the steered tokens are not those of the merged checkpoint")
    if tokens["plug-in, all steered"] == tokens["stock vLLM"]:
        raise RuntimeError("the steered tokens are those of the unsteered requests")
    if "vllm-lens, all steered" in tokens and tokens["vllm-lens, all steered"] == tokens["vllm-lens, unsteered"]:
        raise RuntimeError("vllm-lens steers nothing here")


def _lens_version(python: str) -> str:
    code = "from importlib.metadata import version; print(version('vllm-lens'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


class Engine:
    """An engine in a process of its own, which runs the whole batch whenever it is asked."""

    def __init__(self, kind: str, options: argparse.Namespace, folder: Path) -> None:
        model = folder / "merged" if kind == "merged" else options.model
        python = options.lens if kind == "lens" else sys.executable
        words = [python, "-m", "benchmarks.vllm_throughput", "--worker", kind]
        words += ["--model", str(model), "--intervention", str(folder)] + (["--eager"] if options.eager else [])
        plugins = {"plug-in": "actscale", "lens": "activations"}.get(kind, "")
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": plugins}
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # not all engines on the same cores
        environment.pop("ACTSCALE_INTERVENTIONS", None)
        if kind == "plug-in":
            environment["ACTSCALE_INTERVENTIONS"] = str(folder / "interventions")
        self.log = folder / f"{kind}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.versions: dict[str, str] = self._answer()

    def run(self, asked: str | None) -> dict[str, Any]:
        """Run the batch; {"seconds", "tokens"}."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"an engine ended:\n{last}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=60)


def work(options: argparse.Namespace) -> None:
    """Run an engine: one line of JSON in and one out per batch."""
    answers = os.fdopen(os.dup(1), "w")  # vLLM's own output goes to stderr
    os.dup2(2, 1)
    if options.worker != "plug-in":
        _hide_the_plug_in()
    import torch
    import vllm

    engine = vllm.LLM(
        str(options.model), dtype="float32", max_model_len=512, max_num_seqs=REQUESTS, enforce_eager=options.eager,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    versions = {"vllm": vllm.__version__, "torch": torch.__version__}

    def tell(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    rng = random.Random(0)
    vocabulary = engine.get_tokenizer().vocab_size
    hidden = engine.llm_engine.model_config.get_hidden_size()
    prompts = [
        {"prompt_token_ids": [rng.randrange(100, vocabulary) for _ in range(PROMPT_TOKENS)]} for _ in range(REQUESTS)
    ]
    tell(versions)
    for line in sys.stdin:
        asked = json.loads(line)
        extra = [_extra(asked, number, hidden) for number in range(REQUESTS)]
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, extra_args=own) for own in extra
        ]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tell({"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]})


def _hide_the_plug_in() -> None:
    """Let vLLM find no entry point of this package, as if it were not installed."""
    from importlib import metadata

    find: Any = metadata.entry_points

    def entry_points(**given: Any) -> Any:
        found = find(**given)
        if "group" not in given:
            return found
        return metadata.EntryPoints(one for one in found if not one.value.startswith("actscale_fast."))

    metadata.entry_points = entry_points


def _extra(asked: str | None, number: int, hidden: int) -> dict[str, Any] | None:
    """What one request asks for."""
    if asked == "lens":
        import torch
        from vllm_lens import SteeringVector

        vector = torch.randn(1, hidden, generator=torch.Generator().manual_seed(0))
        return {"apply_steering_vectors": [SteeringVector(activations=vector, layer_indices=[15], scale=5.0)]}
    if asked is None:
        return None
    return {"actscale": "scalars", "actscale_strength": 1.0 if asked == "one" else 1.0 - number / 8}


if __name__ == "__main__":
    main()
