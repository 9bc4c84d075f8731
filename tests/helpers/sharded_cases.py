"""What one process computes on a model, and what two do that hold the model together; both run the same claims.

Two gloo processes on the CPU import the package once and run every claim on every model with every engine; this process
runs the same claims on the whole models meanwhile, each once.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts, interrupted_at
from model_zoo import randomised, tiny_model
from sharded_head import heads
from torch import Tensor

import actscale_fast as af
from actscale_fast._log import logger
from actscale_fast.architectures.lm_head import OutputHead, read_head
from actscale_fast.learning.engine import step_runner
from actscale_fast.learning.fit_settings import FitSettings

TIME_OUT = 12  # seconds after which a process that waits for one that stopped gives up
PATIENCE = 600  # seconds before processes that wait for each other are given up
OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.5, minimality=0.02)
#: Of another length in each row; an even number of tokens, which a reshape of the wrong heads would accept.
IDS = torch.tensor([[5, 9, 12, 7, 3, 2], [1, 1, 14, 3, 19, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
Claim = Callable[[Any], Any]


def made(name: str) -> Any:
    """A whole random model, with the vocabulary of `tiny`."""
    if name == "llama":
        return tiny.llama()
    changes: dict[str, Any] = {"vocab_size": len(tiny.WORDS) + (name == "qwen3")}  # a head of unequal parts
    return tiny_model(name, **changes)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **options).logits[:, -3:]


def gradients(model: Any, parameters: list[Tensor], **options: Any) -> list[Tensor]:
    """Of a sum of chosen log-probabilities."""
    found = model(IDS, attention_mask=MASK, **options).logits[:, -1].log_softmax(-1)[:, ::3].sum()
    return list(torch.autograd.grad(found, parameters))


def interventions(model: Any) -> dict[str, af.Intervention]:
    """One of every kind at the heads, all of it away from 0, and scalars at the other sites and positions."""
    kinds = {"scalar": af.ActivScalar, "vector": af.SteerVec, "dynamic": af.DynScalar, "projection": af.Projection}
    found = {name: randomised(kind.for_model(model), 1, 0.2) for name, kind in kinds.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norms that follow a site
        for site in ("attn_out", "mlp_out", "residual"):
            found[site] = randomised(af.ActivScalar.for_model(model, site=site), 2, 0.2)
    places: dict[str, Any] = {"positions": [0, -1], "generated": True}
    found["positions"] = randomised(af.ActivScalar.for_model(model, **places), 3, 0.5)
    found["position vectors"] = randomised(af.SteerVec.for_model(model, layers=[1], **places), 4, 0.5)
    found["all heads at once"] = randomised(OtherHeads.for_model(model), 5, 0.2)
    return found


class OtherHeads(af.ActivScalar):
    """Adds the next head to each head: an edit that needs all heads, in a class that says nothing of them."""

    def edit(self, x: Tensor, layer: int, strength: Any, placement: Any) -> Tensor:
        alpha = self.alpha[layer]  # [1, H]
        return x + strength * alpha[..., None] * x.roll(1, 2)


def patched(model: Any) -> Any:
    found = {}
    for name, intervention in interventions(model).items():
        with af.patch(model, intervention, strength=-0.7):
            found[name] = logits(model)
    rows = torch.tensor([0.5, -1.0])
    with af.patch(model, randomised(af.ActivScalar.for_model(model), 1, 0.2), strength=rows):
        found["strength per row"] = logits(model)
    stack = af.stack([randomised(af.SteerVec.for_model(model, positions=[-2]), seed, 0.3) for seed in (1, 2)])
    with af.patch(model, stack, group=torch.tensor([1, 0])):
        found["groups"] = logits(model)
    return found


def of_parameters(model: Any) -> Any:
    found = {}
    for name, intervention in interventions(model).items():
        with af.patch(model, intervention, strength=-0.7):
            found[name] = gradients(model, list(intervention.parameters()))
    return found


def generated(model: Any) -> Any:
    found = {}
    for name, intervention in interventions(model).items():
        if name in ("scalar", "positions", "position vectors", "residual"):
            with af.patch(model, intervention, strength=-1.0):
                given = {"input_ids": IDS, "attention_mask": MASK}
                found[name] = model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return found


def masked(model: Any) -> Any:
    found = {}
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    generator = torch.Generator().manual_seed(3)
    for shape in ((n_heads,), (n_layers, n_heads), (2, n_layers, n_heads)):
        mask = torch.rand(shape, generator=generator).requires_grad_()
        with af.head_mask(model, mask):
            found[str(len(shape))] = [logits(model), *gradients(model, [mask])]
    return found


def evaluated(model: Any) -> Any:
    scalars = randomised(af.ActivScalar.for_model(model), 1, 0.3)
    return af.evaluate(model, tiny.tokenizer(), conflicts(6), scalars).to_dict()


def attributed(model: Any) -> Any:
    options: dict[str, Any] = {"progress": False}
    found = af.attribution(model, tiny.tokenizer(), conflicts(4), **options)
    ends = af.attribution(model, tiny.tokenizer(), conflicts(3), positions=[-1], knock_out=False, **options)
    loss = af.attribution(
        model, tiny.tokenizer(), conflicts(3), objective=OBJECTIVE, knock_out=False, site="mlp_out", **options
    )
    return found.scores, found.knock_out, found.logit_difference, ends.scores, loss.scores


def heads_chosen(model: Any) -> Any:
    examples = [replace(example, source=" ".join(reversed(example.prompt.split()))) for example in conflicts(6)]
    own = {"juice": {"positive": [1.0], "negative": [-1.0], "n_scored": 2}, "gates": {"steps": 2}}
    names = ["sadi", "juice", "gates", "interchange", "attribution-refit"]
    options = own | {"interchange": {"steps": 2}, "attribution-refit": {"steps": 2}}
    found = af.compare_heads(
        model, tiny.tokenizer(), examples, examples[:3], names, [2], strengths=[1.0], options=options, progress=False
    )
    scores = found.results[0].selection.scores
    metrics = af.circuit_metrics(model, tiny.tokenizer(), examples, scores, ablation="interchange")
    rows = [(one.selection.scores, one.selection.values, one.evaluation.to_dict()) for one in found.results]
    return rows, list(metrics.faithfulness)


def fitted(
    model: Any, kind: Any = af.ActivScalar, where: dict[str, Any] | None = None, objective: Any = OBJECTIVE,
    n: int = 5, end: str = "", **options: Any,
) -> Any:  # fmt: skip
    """Parameters and losses of a short fit; `end` makes the answers longer."""
    intervention = randomised(kind.for_model(model, **(where or {})), 1, 0.01)
    examples = conflicts(n)
    if end:
        examples = [af.Example(example.prompt, example.correct + end, example.wrong) for example in examples]
    settings: dict[str, Any] = {"steps": 3, "lr": 0.05, "batch_size": 4, "seed": 3, "progress": False} | options
    result = af.fit(model, tiny.tokenizer(), examples, intervention, objective, **settings)
    return list(intervention.parameters()), [record["loss"] for record in result.history]


#: Fits that differ in what a step leaves out, or in how its passes are made.
FITS: dict[str, dict[str, Any]] = {
    "heads": {},
    "shares": {"lr": "5%", "objective": af.Objective(minimality="10%")},
    "the last token": {"where": {"positions": [-1]}},
    "the upper layer": {"where": {"layers": [1]}},
    "vectors, nothing kept": {"kind": af.SteerVec, "where": {"layers": [1]}, "cache_bytes": 0, "spill_bytes": 0},
    "a whole site": {"where": {"site": "mlp_out"}, "kind": af.SteerVec},
    "produced scalars": {"kind": af.DynScalar, "objective": af.Objective(sparsity="scalars", minimality=0.1)},
    "long answers": {"end": " one two"},
    "fewer prompts than processes": {"n": 1},
    "small passes": {"memory_bytes": 4000, "n": 7, "batch_size": 7},
    "recomputed": {"recompute": True},
    "recomputed, the last token": {"recompute": True, "where": {"positions": [-1]}},
    "accumulated": {"accumulate": 3, "n": 7, "batch_size": 7},
    "the reverse divergence, of all tokens": {
        "objective": af.Objective(faithfulness=0.5, kl="reverse", exclude_answers=False)
    },
    "few": {"n_active": 6, "steps": 3, "where": {"layers": [1, 2]}},
}


def all_fits(model: Any) -> Any:
    """The first one checks the model's gradient; the others leave that out, as it would take half of their time."""
    found = {}
    for name, options in FITS.items():
        with unchecked() if found else contextlib.nullcontext():
            found[name] = _or_error(lambda options=options: fitted(model, **options))
    return found


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside it no call checks the structure and the gradient of its model."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("ACTSCALE_CHECK", "0")
        yield


def one_fit(model: Any) -> Any:
    return fitted(model)


def swept(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as own:  # a disk of its own for every process
        found = []
        for _ in range(2):  # the second time, all fits are there
            result = af.sweep(
                model, tiny.tokenizer(), conflicts(5), {"minimality": [0.2, 0.02], "seed": [0, 1]}, OBJECTIVE, steps=3,
                lr=0.05, batch_size=3, folder=own, evaluate_on=conflicts(4, seed=3), progress=False, warm_start=True,
            )  # fmt: skip
            found.append([(fit.intervention.alpha.detach(), fit.score("flips")) for fit in result.fits])
    # Losses of several kinds and small passes, where nothing is kept: processes with other rows run equally many.
    result = af.sweep(
        model, tiny.tokenizer(), conflicts(9), {"margin": [1.0, 2.0], "kl": ["forward", "reverse"]}, OBJECTIVE, steps=2,
        lr=0.05, batch_size=3, accumulate=2, cache_bytes=0, spill_bytes=0, progress=False,
    )  # fmt: skip
    return found, [fit.intervention.alpha.detach() for fit in result.fits]


def resumed(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as own:
        path = Path(own, "fit.safetensors")
        short = fitted(model, steps=4, checkpoint=path, checkpoint_every=1, schedule="constant")
        again = fitted(model, steps=4, checkpoint=path, schedule="constant")
    return short, again


def read(model: Any) -> Any:
    """Activations as the extraction recipes read them, and the vectors that they make."""
    tokenizer = tiny.tokenizer()
    texts = ["The capital of A is Paris", "what is the answer", "one two three"]
    means = af.mean_activations(model, tokenizer, texts, site="head", layers=[0, 1], progress=False)
    whole = af.mean_centring(model, tokenizer, texts[:2], texts[2:], layers=[1], progress=False)
    added = af.act_add(model, tokenizer, "Paris", "Rome", layer=1, padding="Q")
    latent = af.latent_vectors(model, tokenizer, ["one two"], layer=1, steps=3, restarts=1, ends=False, progress=False)
    reading = af.perplexity(model, tokenizer, texts)
    return means.sums, list(whole.parameters()), list(added.parameters()), latent.vectors[0].vectors, reading


def exchanged(model: Any) -> Any:
    """An interchange with a second prompt at the heads, which are rotated."""
    examples = [
        af.Example(one.prompt, one.correct, one.wrong, source=other.prompt)
        for one, other in zip(conflicts(4), conflicts(4, seed=2), strict=True)
    ]
    torch.manual_seed(5)
    das = af.BoundlessDAS.for_model(model, site="head", layers=[1], positions=[-1])
    result = af.fit_interchange(model, tiny.tokenizer(), examples, das, steps=2, progress=False)
    evaluation = af.evaluate(model, tiny.tokenizer(), examples, das)
    return [record["loss"] for record in result.history], evaluation.logit_difference


def merged(model: Any) -> Any:
    found = {}
    before = logits(model)
    for site in ("head", "attn_out"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scalars = randomised(af.ActivScalar.for_model(model, site=site), 1, 0.3)
        af.merge(model, scalars, strength=-0.8)
        found[site] = logits(model)
        af.unmerge(model)
        assert torch.equal(logits(model), before)
    return found


def adapted(model: Any) -> Any:
    """A model with its intervention inside, trained by an optimizer of the caller's, saved and loaded."""
    applied = af.get_actscale_model(model, af.ActScaleConfig())
    optimizer = torch.optim.SGD([p for p in applied.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = applied(IDS, attention_mask=MASK, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    values = [value.detach().clone() for value in applied.intervention.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        applied.save_pretrained(folder)
        applied.unload()
        loaded = af.ActScaleModel.from_pretrained(model, folder)
        found = logits(loaded)
        loaded.unload()
    return losses, values, found


def identified(model: Any) -> Any:
    from actscale_fast.architectures.weights_digest import weights_digest

    return weights_digest(model, collective=True)


CLAIMS: dict[str, Claim] = {
    "patch": patched, "gradients": of_parameters, "generate": generated, "head_mask": masked, "evaluate": evaluated,
    "attribution": attributed, "fit": all_fits, "sweep": swept, "resume": resumed, "extraction": read,
    "heads": heads_chosen, "interchange": exchanged, "merge": merged, "get_actscale_model": adapted,
    "identity": identified,
}  # fmt: skip
#: What runs on families beside Llama; Gemma 2 has a soft-cap of its logits.
SHORT: dict[str, Claim] = {"patch": patched, "generate": generated, "fit": one_fit, "merge": merged}
SHORTEST: dict[str, Claim] = {"fit": one_fit}


def load_tensor_parallel(name: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2)
    return AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config).eval()


def load_fully_sharded(name: str, folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = made(name)
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


@dataclass(frozen=True)
class Sharding:
    """How the two processes load a model, and which models they load."""

    load: Callable[[str, Path], Any]
    names: tuple[str, ...]


ENGINES = {
    "tensor parallelism": Sharding(load_tensor_parallel, ("llama", "qwen3", "gemma3_text", "qwen3_moe", "gemma2")),
    "FSDP2": Sharding(load_fully_sharded, ("llama", "gpt2")),
}


#: Those that read weights.
METHODS = ("sami", "head-pursuit")


def heads_by(method: str, model: Any) -> Any:
    return af.select_heads(model, tiny.tokenizer(), conflicts(4), method, 1, progress=False).scores


def shared_work(model: Any, folder: Path, rank: int) -> dict[str, Any]:
    """What only several processes can do, right or wrong."""
    found: dict[str, Any] = {}
    found["unequal memory"] = fitted(model, n=7, batch_size=7, memory_bytes=4000 if rank else None)
    found["less memory later"] = memory_running_low(model, rank, 100_000)
    found["too little for one"] = memory_running_low(model, rank, 10)
    head = read_head(model, {"input_ids": IDS})
    found["rows of the head"] = None if head is None else len(head.weight)
    found["each by itself"] = fitted(model, distributed=False)
    found["other examples"] = _or_error(lambda: fitted(model, n=5 + rank))
    found["other settings"] = _or_error(lambda: fitted(model, seed=rank))
    found["evaluate others"] = _or_error(
        lambda: af.evaluate(model, tiny.tokenizer(), conflicts(3 + rank), af.ActivScalar.for_model(model))
    )
    found["graphs"] = _or_error(lambda: fitted(model, capture=True))
    for method in METHODS:
        found[method] = _or_error(lambda method=method: heads_by(method, model))
    path = folder / "begun by one" / "fit.safetensors"
    if rank == 0:
        with interrupted_at(2):
            fitted(made("llama"), steps=4, checkpoint=path, schedule="constant", distributed=False)
    torch.distributed.barrier()
    found["begun by one"] = fitted(model, steps=4, checkpoint=path, schedule="constant")
    grid = {"minimality": [0.2, 0.02]}
    result = af.sweep(
        model,
        tiny.tokenizer(),
        conflicts(5),
        grid,
        OBJECTIVE,
        steps=3,
        lr=0.05,
        folder=folder / "sweep",
        progress=False,
    )
    found["one disk"] = [fit.intervention.alpha.detach() for fit in result.fits]
    found["files"] = sorted(
        str(file.relative_to(folder / "sweep")) for file in (folder / "sweep").rglob("*.safetensors")
    )
    return found


def alone_work() -> dict[str, Any]:
    """What one process finds in place of the shared work."""
    model = made("llama")
    grid = {"minimality": [0.2, 0.02]}
    result = af.sweep(model, tiny.tokenizer(), conflicts(5), grid, OBJECTIVE, steps=3, lr=0.05, progress=False)
    return {method: heads_by(method, model) for method in METHODS} | {
        "unequal memory": fitted(model, n=7, batch_size=7),
        "less memory later": fitted(model, n=7, batch_size=7),
        "too little for one": fitted(model, n=7, batch_size=7),
        "each by itself": fitted(model),
        "begun by one": fitted(model, steps=4, schedule="constant"),
        "one disk": [fit.intervention.alpha.detach() for fit in result.fits],
    }


def memory_running_low(model: Any, rank: int, left: int) -> Any:
    """A fit in which one process has so many bytes left from its second step on, and says so in a warning.

    Where they are too few for a single prompt, both compute their layers again, which the log says.
    """
    free, calls, logged = step_runner.free_bytes, [], Logged()

    def less(device: torch.device) -> int:
        calls.append(1)
        return left if rank == 1 and len(calls) > 3 else free(device)

    level = logger.level
    logger.addHandler(logged)
    logger.setLevel(logging.INFO)
    step_runner.free_bytes = less  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = fitted(model, n=7, batch_size=7)
    finally:
        step_runner.free_bytes = free
        logger.removeHandler(logged)
        logger.setLevel(level)
    recomputed = [
        line
        for line in logged.lines
        if line.startswith("recompute: too little memory is left for a single prompt in process 1")
    ]
    assert len(recomputed) == (left < 1000)
    assert any(str(warning.message).startswith("too little memory is left for") for warning in said) or left < 1000
    return found


class Logged(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def without_memory(model: Any, rank: int) -> str:
    """The error of a fit in which one process runs out of memory; the others wait in its pass."""
    loss, calls = OutputHead.intervention_loss, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 6:
            raise torch.OutOfMemoryError("out of memory")
        return loss(*arguments, **options)

    OutputHead.intervention_loss = failing  # type: ignore[method-assign, assignment]
    try:
        return str(_or_error(lambda: fitted(model, n=7, batch_size=7, accumulate=7)))
    finally:
        OutputHead.intervention_loss = loss  # type: ignore[method-assign]


#: A fit of which one process is killed in its fourth step.
KILLED: dict[str, Any] = {"steps": 6, "checkpoint_every": 1, "schedule": "constant"}


def killed(model: Any, rank: int, path: Path) -> str:
    """The error of the process that is left."""
    order = FitSettings.rows

    def killing(self: FitSettings, n: int, step: int) -> list[int]:
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return order(self, n, step)

    FitSettings.rows = killing  # type: ignore[method-assign, assignment]
    return str(_or_error(lambda: fitted(model, checkpoint=path, **KILLED)))


def claims_on(name: str) -> dict[str, Claim]:
    return {"llama": CLAIMS, "gemma2": SHORTEST}.get(name, SHORT)


def run_claims(models: dict[str, Any]) -> dict[str, Any]:
    """The result of every claim, or its error, by "model: claim"."""
    found = {}
    for name, model in models.items():
        for claim, run in claims_on(name).items():
            begun = time.process_time()
            found[f"{name}: {claim}"] = _or_error(lambda run=run, model=model: run(model))
            if os.environ.get("ACTSCALE_TEST_TIMES"):
                print(f"{name}: {claim} {time.process_time() - begun:.2f} s", file=sys.stderr, flush=True)
    return found


def _or_error(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception:
        return traceback.format_exc()


def in_process(rank: int, ports: Sequence[int], folder: Path, engines: Sequence[str]) -> None:
    """Join the other process, run all claims, and save what was found; the second process is killed in the end."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not have an address
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TQDM_DISABLE": "1"}
    _join(ports[0])
    found: dict[str, Any] = {"heads": _or_error(heads)}
    for engine in engines:
        sharding = ENGINES[engine]
        models = {name: sharding.load(name, folder) for name in sharding.names}
        found[engine] = run_claims(models)
        own = folder / engine
        with unchecked():
            found[engine]["shared work"] = _or_error(lambda: shared_work(models["llama"], own, rank))  # noqa: B023
    models = {}
    for port, engine in zip(ports[1:], engines, strict=True):  # a group of their own, which is unusable afterwards
        gc.collect()  # where one process stopped, its connections close, and the other one notices
        torch.distributed.destroy_process_group()
        _join(port)
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIME_OUT))  # type: ignore[attr-defined]
        model = ENGINES[engine].load("llama", folder)
        if engine == engines[-1]:
            torch.save(found, folder / f"{rank}.pt")
            found[engine]["killed"] = killed(model, rank, folder / "killed.safetensors")
        else:
            found[engine]["memory"] = without_memory(model, rank)
            del model
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)


def _join(port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")


def ranks_and_one(folder: Path, engines: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what each of two processes found on sharded models, what this process found on whole ones)."""
    names = sorted({name for engine in engines for name in ENGINES[engine].names})
    for name in names:
        made(name).save_pretrained(folder / name)
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(1 + len(engines))]
        for one in free:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in free]
    spawned = torch.multiprocessing.get_context("spawn")
    started = [spawned.Process(target=in_process, args=(rank, ports, folder, engines)) for rank in range(2)]
    for process in started:
        process.start()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = run_claims({name: made(name) for name in names})
        expected |= {"heads": heads(), "shared work": alone_work(), "killed": fitted(made("llama"), **KILLED)}
    finally:
        torch.set_num_threads(before)
        deadline = time.monotonic() + PATIENCE
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0, -signal.SIGKILL) for process in started):
                break
            time.sleep(0.1)
        for process in started:
            process.kill()
            process.join()
    assert [process.exitcode for process in started] == [0, -signal.SIGKILL], "see the errors of the processes above"
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    found[0]["resumed"] = fitted(made("llama"), checkpoint=folder / "killed.safetensors", **KILLED)
    return found, expected


def differences(found: Any, expected: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places in nested results where numbers are further apart than 1e-5, relative to their tensor's largest."""
    if isinstance(expected, dict):
        if found.keys() != expected.keys() if isinstance(found, dict) else True:
            yield where, found, expected
            return
        for name in expected:
            yield from differences(found[name], expected[name], f"{where}[{name}]")
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(found) == len(expected):
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif isinstance(expected, Tensor | float) and isinstance(found, Tensor | float):
        one, other = (torch.as_tensor(value).detach().double() for value in (found, expected))
        size = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        if one.shape != other.shape or not bool(((one - other).abs() <= 1e-5 * size).all()):
            gap = float((one - other).abs().max()) if one.shape == other.shape else (one.shape, other.shape)
            yield where, gap, size
    elif type(found) is not type(expected) or found != expected:
        yield where, found, expected


def errors_in(found: Any) -> list[str]:
    """The errors among nested results."""
    if isinstance(found, dict):
        return [error for value in found.values() for error in errors_in(value)]
    return [found] if isinstance(found, str) and found.startswith("Traceback") else []


def claims_of(engine: str) -> list[str]:
    """The names of the results of `run_claims` with an engine."""
    return [f"{name}: {claim}" for name in ENGINES[engine].names for claim in claims_on(name)]
