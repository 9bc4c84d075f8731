"""torch.compile and a patch: traced whole, and seen whichever of the two came first."""

from __future__ import annotations

import pytest
import torch
from model_zoo import IDS, SITES, logits, randomised, scalars, tiny_model
from torch import Tensor, nn

from actscale_fast.patching.patch import patch


class Compiled:
    """A model under torch.compile(fullgraph=True), which counts the graphs it was traced into."""

    def __init__(self, model: nn.Module) -> None:
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        self.counter = CompileCounter()
        self.call = torch.compile(model, backend=self.counter, fullgraph=True)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.call(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


@pytest.mark.parametrize("positions", [None, [0, -1]])
@pytest.mark.parametrize("site", ["head", "residual"])
def test_a_patch_before_compile_is_traced_whole_and_sees_new_values(site: str, positions: list[int] | None) -> None:
    model = tiny_model("llama")
    intervention = scalars(model, site=site, positions=positions)
    before = logits(model)
    with patch(model, intervention) as handle:
        compiled = Compiled(model)
        torch.testing.assert_close(compiled(), logits(model))
        randomised(intervention, 7)
        torch.testing.assert_close(compiled(), logits(model))
        assert compiled.counter.frame_count == 1
        handle.strength = -0.5
        torch.testing.assert_close(compiled(), logits(model))
    torch.testing.assert_close(compiled(), before)


@pytest.mark.parametrize(("site", "positions"), [*((site, None) for site in SITES), ("head", [0, -1])])
def test_a_compiled_model_sees_a_patch_its_removal_and_the_next_one(site: str, positions: list[int] | None) -> None:
    model = tiny_model("llama")
    before = logits(model)
    compiled = Compiled(model)
    torch.testing.assert_close(compiled(), before)
    for seed in (1, 2):
        with patch(compiled.call, scalars(model, seed, site=site, positions=positions)):
            patched = logits(model)
            assert not torch.allclose(patched, before)
            torch.testing.assert_close(compiled(), patched)
        torch.testing.assert_close(compiled(), before)


@pytest.mark.parametrize("positions", [None, [0, -1]])
def test_layers_compiled_in_place_see_a_patch_and_its_removal(positions: list[int] | None) -> None:
    torch._dynamo.reset()
    model, eager = tiny_model("llama"), tiny_model("llama")
    before = logits(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(logits(model), before)
    intervention = scalars(model, positions=positions)
    with patch(model, intervention), patch(eager, intervention):
        assert not torch.allclose(logits(eager), before)
        torch.testing.assert_close(logits(model), logits(eager))
    torch.testing.assert_close(logits(model), before)
