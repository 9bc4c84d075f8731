"""torch.compile'd models fit like the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from fit_cases import conflicts

import actscale_fast as af

pytestmark = pytest.mark.slow

OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.5, minimality=0.05)
#: The gradient check runs passes of shapes of its own, of which each is compiled; one test of a whole fit makes it.
UNCHECKED = pytest.mark.usefixtures("unchecked_fits")


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.n_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.n_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fitted(model: Any, steps: int = 2, prompts: int = 2, **where: Any) -> torch.Tensor:
    scalars = af.ActivScalar.for_model(model, **where)
    af.fit(
        model,
        tiny.tokenizer(),
        conflicts(prompts),
        scalars,
        OBJECTIVE,
        steps=steps,
        lr=0.05,
        batch_size=2,
        progress=False,
    )
    return scalars.alpha.detach()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.any()


@pytest.mark.parametrize(
    ("way", "layers", "where"), [("wrapped", 1, {}), ("in place", 2, {"positions": [-1], "layers": [1]})], ids=str
)
def test_a_compiled_model_gives_the_fit_of_the_model(
    way: str, layers: int, where: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if way == "in place":
        request.getfixturevalue("unchecked_fits")
    model, backend = tiny.llama(layers=layers), Counting()
    ids = torch.tensor([[5, 6, 7]])
    expected, logits = fitted(tiny.llama(layers=layers), **where), model(ids).logits
    if way == "wrapped":
        compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break would be an error
    else:
        model.compile(backend=backend)
        compiled = model
    torch.testing.assert_close(compiled(ids).logits, logits)  # compiled before there is anything to see
    before = backend.n_graphs
    assert_same(fitted(compiled, **where), expected)
    assert backend.n_graphs > before  # the fit's passes were graphs too
    torch.testing.assert_close(compiled(ids).logits, logits)


@UNCHECKED
def test_inductors_kernels_give_the_same_fit() -> None:
    model = tiny.llama(layers=1)
    expected = fitted(tiny.llama(layers=1), steps=1, prompts=1)
    model.compile()  # in place: the engine sees a plain model
    assert_same(fitted(model, steps=1, prompts=1), expected)


@UNCHECKED
def test_layers_compiled_one_by_one_give_the_same_fit() -> None:
    model = tiny.llama(layers=2)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert_same(fitted(model, layers=[0, 1]), fitted(tiny.llama(layers=2), layers=[0, 1]))
