"""Every system, made by the command line: patched, saved, loaded, evaluated, and generating with padding and cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from word_models import save_model

import actscale_fast as af
from actscale_fast.cli import main

PAIRS = [
    ("The capital of Norway is Cairo. Q: What is the capital of Norway? A:", "Oslo", "Cairo"),
    ("The capital of Italy is Lima. Q: What is the capital of Italy? A:", "Rome", "Lima"),
    ("The capital of France is Rome. Q: What is the capital of France? A:", "Paris", "Rome"),
    ("The capital of Greece is Oslo. Q: What is the capital of Greece? A:", "Athens", "Oslo"),
]
FIT = "--steps 3 --batch-size 4 --minimality 0 --lr 0.2"
#: The words behind `actscale-fast`, without model and folder.
SYSTEMS: dict[str, str] = {
    "activ-scalar": f"fit --data DATA {FIT}",
    "activ-scalar by site and position": f"fit --data DATA {FIT} --site attn_out,mlp_out --positions 0,1,-1",
    "steer-vec": f"fit --kind steer-vec --data DATA {FIT}",
    "dyn-scalar": f"fit --kind dyn-scalar --data DATA {FIT} --sparsity scalars",
    "act-add": "extract act-add --positive Paris --negative Oslo --layer 1 --coefficient 5",
    "mean-centring": "extract mean-centring --target TARGET --training TRAINING --layers 0 --coefficient 4",
    "mean-centring, all": "extract mean-centring --target TARGET --training TRAINING --layers 0 --every-token",
    "instruction, set": "extract instruction --data TOLD --layer 0",
    "instruction, added": "extract instruction --data TOLD --layer -1 --mode add --coefficient 3",
    "latent": "extract latent --sentence Paris --layer 0 --steps 20",
    "interchange": "interchange --data SOURCES --layers 0 --epochs 1 --batch-size 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and the files that the commands read."""
    folder = tmp_path_factory.mktemp("systems")
    save_model(folder / "MODEL")
    rows = [{"prompt": prompt, "correct": f" {c}", "wrong": f" {w}"} for prompt, c, w in PAIRS]
    sources = [row | {"source": PAIRS[number - 1][0]} for number, row in enumerate(rows)]
    told = [{"with": f"{prompt} I repeat", "without": prompt} for prompt, _, _ in PAIRS]
    for name, lines in (("DATA", rows), ("SOURCES", sources), ("TOLD", told)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "TARGET").write_text("The capital of Italy is Rome.\nWhat is the capital of France?\n")
    (folder / "TRAINING").write_text("Mary and John came to the store.\nThen they handed a book to Anna.\n")
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[[str], Path]:
    """The folder of a system, made by the command line when it is first asked for."""
    there: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in there:
            out = folder / f"made {len(there)}"
            words = [str(folder / word) if (folder / word).exists() else word for word in SYSTEMS[name].split()]
            assert main([*words, "--model", str(folder / "MODEL"), "--out", str(out)]) == 0
            there[name] = out
        return there[name]

    return make


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "MODEL").eval()
    return model, AutoTokenizer.from_pretrained(folder / "MODEL")


def by_recomputing(model: Any, tokens: Any, intervention: Any, prompt: str, strength: float, source: str) -> list[int]:
    """Six tokens, each from a forward pass over the whole text without a cache."""
    ids = tokens(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad(), af.patch(model, intervention, strength=strength) as patched:
        for _ in range(6):
            with patched.prompt(length), sourced(model, tokens, intervention, [source]):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, length:].tolist()


def sourced(model: Any, tokens: Any, intervention: Any, texts: list[str]) -> Any:
    import contextlib

    if not intervention.needs_source:
        return contextlib.nullcontext()
    with af.patch(model, af.ActivScalar.for_model(model)):  # at rest; patches of the model are part of it
        return intervention.interchange(af.source_activations(model, tokens, intervention, texts))


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_is_patched_with_an_effect_and_leaves_no_trace(folder: Path, made: Any, name: str) -> None:
    model, tokens = opened(folder)
    intervention = af.load_intervention(made(name))
    ids = tokens(PAIRS[0][0], return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        source = sourced(model, tokens, intervention, [PAIRS[1][0]])
        with source, af.patch(model, intervention) as patched:
            steered = model(ids).logits
            patched.strength = 0.0
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids).logits, before)
    assert steered.isfinite().all()
    assert not torch.allclose(steered, before, atol=1e-3)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_saved_again_is_the_same(folder: Path, made: Any, name: str, tmp_path: Path) -> None:
    first = af.load_intervention(made(name))
    first.save_pretrained(tmp_path)
    second = af.load_intervention(tmp_path)
    assert type(second) is type(first)
    assert [single.location for single in second.singles] == [single.location for single in first.singles]
    model, tokens = opened(folder)
    ids = tokens(PAIRS[2][0], return_tensors="pt").input_ids
    found = []
    for intervention in (first, second):
        source = sourced(model, tokens, intervention, [PAIRS[1][0]])
        with torch.no_grad(), source, af.patch(model, intervention, strength=-0.5):
            found.append(model(ids).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_command_line_generates_what_recomputing_every_token_gives(
    folder: Path, made: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts of different lengths and two strengths, in one padded batch with a cache."""
    from actscale_fast.cli.output import continuations

    model, tokens = opened(folder)
    intervention = af.load_intervention(made(name))
    prompts, strengths = [PAIRS[0][0], "What is the capital of France?"], [1.0, -0.5]
    sources = [PAIRS[1][0], PAIRS[2][0]] if intervention.needs_source else []
    found = continuations(model, tokens, intervention, prompts, strengths, 6, sources=sources)
    for row, prompt in enumerate(prompts):
        for text, strength in zip(found[row], strengths, strict=True):
            source = sources[row] if sources else ""
            ids = by_recomputing(model, tokens, intervention, prompt, strength, source)
            ids = ids[: ids.index(tokens.eos_token_id)] if tokens.eos_token_id in ids else ids
            assert text == tokens.decode(ids, skip_special_tokens=True)
    words = ["generate", "--model", str(folder / "MODEL"), "--intervention", str(made(name)), "--max-new-tokens", "4"]
    for option, texts in (("--prompt", prompts), ("--source", sources)):
        words += [word for text in texts for word in (option, text)]
    capsys.readouterr()
    assert main([*words, "--strength", "1,0"]) == 0
    printed = capsys.readouterr().out
    assert all(prompt in printed for prompt in prompts)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_command_line_evaluates_it(folder: Path, made: Any, name: str, tmp_path: Path) -> None:
    data = folder / ("SOURCES" if name == "interchange" else "DATA")
    words = ["evaluate", "--model", str(folder / "MODEL"), "--intervention", str(made(name)), "--data", str(data)]
    assert main([*words, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["n_examples"] == 4
    assert found["kl"] > 0


def test_interventions_are_combined_by_the_command_line(folder: Path, made: Any, tmp_path: Path) -> None:
    one, other = made("activ-scalar"), made("act-add")
    assert main(["combine", str(one), str(other), "--factors", "-0.5,2", "--out", str(tmp_path)]) == 0
    total = af.load_intervention(tmp_path)
    expected = -0.5 * af.load_intervention(one) + 2.0 * af.load_intervention(other)
    model, tokens = opened(folder)
    ids = tokens(PAIRS[0][0], return_tensors="pt").input_ids
    found = []
    for intervention in (total, expected):
        with torch.no_grad(), af.patch(model, intervention):
            found.append(model(ids).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("combine ONE --factors 1,2 --out o", "factors: got 2 for 1 interventions"),
        ("extract instruction --data TOLD --layer 0 --mode add --out o", "--coefficient is required with --mode add"),
        ("extract instruction --data DATA --layer 0 --out o", "expected strings under the keys 'with' and 'without'"),
        ("extract mean-centring --target none.txt --training TARGET --layers 0 --out o", "target: there is no file"),
        ("fit --site head,heads --data DATA --out o", "site: got 'heads', expected one of"),
        ("fit --sparsity scalars --data DATA --out o", "sparsity='scalars' requires a DynScalar"),
        ("interchange --data DATA --layers 0 --out o", "source"),
        ("generate --intervention ONE --prompt A --source B", "source: this intervention exchanges nothing"),
        ("generate --intervention DAS --prompt A", "source: got 0 for 1 prompts"),
        ("fit --data DATA --aligned --out o", "--aligned is only available for the tasks country-capital"),
        ("fit --task indirect-object --split both --out o", "--split is only available for the task country-capital"),
    ],
)
def test_mistakes_cost_one_line(
    folder: Path, made: Any, words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"ONE": str(made("activ-scalar")), "DAS": str(made("interchange")), "o": str(tmp_path / "o")}
    given = [names.get(word, str(folder / word) if (folder / word).exists() else word) for word in words.split()]
    capsys.readouterr()
    model = [] if given[0] == "combine" else ["--model", str(folder / "MODEL")]
    assert main([*given, *model]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("actscale-fast")]
    assert message in line
