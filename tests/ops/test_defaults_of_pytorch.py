"""PyTorch's default dtype and device are the caller's: nothing here changes with them."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import actscale_fast as af
from actscale_fast.das.fit_interchange import fit_interchange

LAYERS = [0, 2]
EXAMPLES = [
    af.Example("The capital of A is", " Paris", " Rome"),
    af.Example("Q what is B answer", " Berlin", " Oslo"),
    af.Example("The capital of one is", " Madrid", " Paris"),
]


def values_of(intervention: Any) -> dict[str, Tensor]:
    found = {name: value.detach().clone() for name, value in intervention.named_parameters()}
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(value.device.type == "cpu" for value in found.values())
    return found | {name: value.clone() for name, value in intervention.named_buffers()}


def fitted(model: Any, tokens: Any, **options: Any) -> Any:
    scalars = af.ActivScalar.for_model(model, layers=LAYERS, positions=options.pop("positions", None))
    objective = af.Objective(minimality=0.01)
    return af.fit(model, tokens, EXAMPLES, scalars, objective, steps=3, batch_size=2, progress=False, **options)


def fit(model: Any, tokens: Any, folder: Path) -> Any:
    result = fitted(model, tokens, checkpoint=folder / "fit.safetensors")
    return values_of(result.intervention), [record["loss"] for record in result.history]


def fit_of_the_last_token(model: Any, tokens: Any, folder: Path) -> Any:
    return values_of(fitted(model, tokens, positions=[-1]).intervention)


def evaluate(model: Any, tokens: Any, folder: Path) -> Any:
    return af.evaluate(model, tokens, EXAMPLES, fitted(model, tokens).intervention).to_dict()


def probes(model: Any, tokens: Any, folder: Path) -> Any:
    scalars = af.DynScalar.for_model(model, layers=LAYERS)
    objective = af.Objective(minimality=0.01, sparsity="scalars")
    af.fit(model, tokens, EXAMPLES, scalars, objective, steps=2, lr=0.01, progress=False)
    return values_of(scalars)


def vectors(model: Any, tokens: Any, folder: Path) -> Any:
    vector = af.SteerVec.for_model(model, "residual", LAYERS)
    af.fit(model, tokens, EXAMPLES, vector, steps=2, lr=0.01, progress=False)
    return values_of(vector)


def attribution(model: Any, tokens: Any, folder: Path) -> Any:
    return af.attribution(model, tokens, EXAMPLES, progress=False).to_dict()


def sweep(model: Any, tokens: Any, folder: Path) -> Any:
    found = af.sweep(
        model, tokens, EXAMPLES, {"minimality": [0.01, 0.1]}, steps=2, batch_size=2, progress=False, folder=folder / "s"
    )
    return [values_of(point.intervention) for point in found.fits]


def path(model: Any, tokens: Any, folder: Path) -> Any:
    return af.minimality_path(model, tokens, EXAMPLES, 3)


def merge(model: Any, tokens: Any, folder: Path) -> Any:
    scalars = af.ActivScalar.for_model(model, layers=LAYERS)
    with torch.no_grad():
        scalars.alpha.fill_(0.3)
    af.merge(model, scalars)
    merged = {name: value.clone() for name, value in model.state_dict().items()}
    af.unmerge(model)
    return merged


def saved(model: Any, tokens: Any, folder: Path) -> Any:
    fitted(model, tokens).intervention.save_pretrained(folder / "saved")
    return values_of(af.load_intervention(folder / "saved"))


def masked_heads(model: Any, tokens: Any, folder: Path) -> Any:
    ids = torch.tensor([[4, 5, 6, 7]], device="cpu")
    mask = torch.ones(3, 4, dtype=torch.float32, device="cpu")
    mask[1, 2] = 0
    with torch.no_grad(), af.head_mask(model, mask):
        return model(ids).logits


def steered(model: Any, tokens: Any, folder: Path) -> Any:
    ids = torch.tensor([[4, 5, 6, 7], [1, 1, 6, 7]], device="cpu")
    kept = (ids != 1).to(torch.int64)
    scalars = af.ActivScalar.for_model(model, positions=[-1], generated=True)
    with torch.no_grad():
        scalars.alpha.fill_(0.5)
    strength = torch.tensor([1.0, -1.0], dtype=torch.float32, device="cpu")
    with torch.no_grad(), af.patch(model, scalars, strength=strength):
        return model(ids, attention_mask=kept).logits


def interchange(model: Any, tokens: Any, folder: Path) -> Any:
    examples = [af.Example(e.prompt, e.correct, e.wrong, source="Q what is A answer") for e in EXAMPLES]
    das = af.BoundlessDAS.for_model(model, "residual", [1], positions=[-1])
    fit_interchange(model, tokens, examples, das, steps=2, batch_size=2, progress=False)
    return values_of(das)


def extraction(model: Any, tokens: Any, folder: Path) -> Any:
    texts = ["The capital of A is Paris", "Q what is B", "answer in one two"]
    added = af.act_add(model, tokens, "The capital of", "Q what", layer=1, padding="Q")
    centred = af.mean_centring(model, tokens, texts[:2], texts[1:], layers=[1], progress=False)
    return values_of(added), values_of(centred)


def latent(model: Any, tokens: Any, folder: Path) -> Any:
    found = af.latent_vectors(model, tokens, ["Paris is"], layer=1, steps=3, progress=False)
    return [values_of(vector) for vector in getattr(found, "vectors", found)]


WORK = [
    fit, fit_of_the_last_token, evaluate, probes, vectors, attribution, sweep, path, merge, saved, masked_heads,
    steered, interchange, extraction, latent,
]  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name != "seconds":
                assert_same(found[name], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def result(work: Callable[[Any, Any, Path], Any], folder: Path, change: Callable[[], None] = lambda: None) -> Any:
    tokens, model = tiny.tokenizer(), tiny.llama()
    random.seed(0), torch.manual_seed(0)
    change()
    return work(model, tokens, folder)


@functools.cache
def plain(work: Callable[[Any, Any, Path], Any]) -> Any:
    """The numbers under PyTorch's own defaults."""
    with tempfile.TemporaryDirectory() as folder:
        return result(work, Path(folder))


@pytest.fixture(params=["float64", "bfloat16", "float16", "meta"])
def changed_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("work", WORK)
def test_the_same_numbers_under_any_default_dtype_and_device(
    work: Callable[[Any, Any, Path], Any], changed_default: Callable[[], None], tmp_path: Path
) -> None:
    expected = plain(work)
    assert_same(result(work, tmp_path, changed_default), expected)


def test_the_scalars_of_a_new_intervention_are_float32_under_any_default_dtype(
    changed_default: Callable[[], None],
) -> None:
    model = tiny.llama()
    changed_default()
    for kind in (af.ActivScalar, af.SteerVec, af.DynScalar):
        values_of(kind.for_model(model))
