"""AISteer360's files: each kind acts where its control acts, and the numbers come back bit for bit.

The library is not needed and not installed; its transforms (additive.py, head_additive.py at the commit that the
integration names) are written out here as hooks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import logits, randomised, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.integrations import aisteer360

D, H, W = 32, 4, 8  # of the tiny models: hidden size, heads, head dimension


def directions(*shape: int, layers: tuple[int, ...] = (0, 1)) -> dict[int, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {layer: torch.randn(*shape, generator=source) for layer in layers}


def file(folder: Path, found: dict[int, Tensor], model_type: str = "llama", **others: Any) -> Path:
    """As SteeringVector.save of the library writes it."""
    data = {"model_type": model_type, "directions": {str(k): v.tolist() for k, v in found.items()}, **others}
    path = folder / "vector.svec"
    path.write_text(json.dumps(data))
    return path


def hooked(model: nn.Module, handles: list[Any]) -> Tensor:
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_a_direction_is_added_to_a_layers_output_as_caa_adds_it(family: str, strength: float, tmp_path: Path) -> None:
    model, found = tiny_model(family), directions(1, D)
    ours = aisteer360.load(file(tmp_path, found, family), model, layers=[1])
    with af.patch(model, ours, strength=strength):
        got = logits(model)
    add = lambda module, args, output: output + strength * found[1][0]  # noqa: E731
    expected = hooked(model, [layout(model).layers[1].register_forward_hook(add)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, logits(model), atol=1e-3)


def test_positions_are_added_to_a_layers_input_as_act_add_adds_them(tmp_path: Path) -> None:
    model, found = tiny_model(), directions(3, D)
    ours = aisteer360.load(file(tmp_path, found), model, kind="positions", layers=[1])
    assert ours.location.positions == (0, 1, 2)
    with af.patch(model, ours, strength=1.5):
        got = logits(model)

    def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0].clone()
        x[:, :3] += 1.5 * found[1]
        return (x, *args[1:]), kwargs

    expected = hooked(model, [layout(model).layers[1].register_forward_pre_hook(add, with_kwargs=True)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("top", [None, 3])
def test_heads_are_shifted_before_the_projection_as_iti_shifts_them(
    family: str, top: int | None, tmp_path: Path
) -> None:
    model, found = tiny_model(family), directions(H, W)
    accuracies = {(layer, head): ((5 * layer + 3 * head) % 7) / 7 for layer in (0, 1) for head in range(H)}
    chosen = sorted(accuracies, key=accuracies.__getitem__, reverse=True)[:top]
    named = {f"{layer}:{head}": value for (layer, head), value in accuracies.items()}
    path = file(tmp_path, found, family, num_heads=H, head_dim=W, probe_accuracies=named)
    with af.patch(model, aisteer360.load(path, model, top_heads=top), strength=-3.0):
        got = logits(model)

    def shift(layer: int) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            for head in (head for at, head in chosen if at == layer):
                x[..., head * W : (head + 1) * W] += -3.0 * found[layer][head]
            return (x,)

        return add

    modules = layout(model).projections
    expected = hooked(model, [m.register_forward_pre_hook(shift(layer)) for layer, m in enumerate(modules)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "positions", "shape"),
    [("residual", None, (1, D)), ("residual", (0, 1, 2), (3, D)), ("head", None, (H, W))],
)
def test_ours_come_back_bit_for_bit(site: str, positions: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    model = tiny_model()
    ours = randomised(af.SteerVec.for_model(model, site, [0], positions))
    path = aisteer360.save(ours, tmp_path / "made" / "by_us")  # type: ignore[arg-type]
    assert path == tmp_path / "made" / "by_us.svec"
    kind = "positions" if positions else None
    back = aisteer360.load(tmp_path / "made" / "by_us", model, kind=kind)
    assert back.location == ours.location
    assert torch.equal(back.vectors, ours.vectors)
    data = json.loads(path.read_text())
    assert data["model_type"] == "llama"
    assert (data.get("num_heads"), data.get("head_dim")) == ((H, W) if site == "head" else (None, None))
    ((layer, values),) = data["directions"].items()
    assert layer == ("1" if positions else "0")  # act_add adds to the input of the next layer
    assert torch.tensor(values).shape == shape


def test_files_of_before_hold_one_row_without_its_axis(tmp_path: Path) -> None:
    model, found = tiny_model(), directions(D)
    assert torch.equal(aisteer360.load(file(tmp_path, found), model).vectors[1].flatten(), found[1])


def test_several_directions_a_layer_are_not_guessed_at(tmp_path: Path) -> None:
    path = file(tmp_path, directions(2, D))
    with pytest.raises(
        ValueError, match=r"kind: .* holds 2 directions per layer: either one for each token \('positions'\) or"
    ):
        aisteer360.load(path, tiny_model())


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        ({}, {"kind": "planes"}, "kind: got 'planes', expected one of direction, positions, heads"),
        ({}, {"layers": [7]}, r"layers: got 7, expected some of \[0, 1\]"),
        ({}, {"top_heads": 1}, "top_heads: got 1 of kind 'direction' with 0 probe accuracies"),
        ({}, {"kind": "positions"}, "layer 0: its input is the embedding's output"),
        ({"model_type": "gpt2"}, {}, "made for 'gpt2', the model is 'llama'"),
        ({"found": directions(1, 8)}, {}, r"layer 0: got vectors of shape \(1, 1, 8\), expected \(1, 1, 32\)"),
        ({"found": directions(1, D, layers=(4,))}, {}, "layers: got 4"),
        ({"found": {}}, {}, r"damaged or not a steering vector \(ValueError: no directions"),
        ({"found": directions(2, 2, D)}, {}, "damaged or not a steering vector"),
        ({"found": {0: torch.full((1, D), torch.nan)}}, {}, "not finite"),
        ({"probe_accuracies": {"first": 1.0}}, {}, "damaged or not a steering vector"),
    ],
)
def test_a_file_that_is_not_for_the_model_is_refused(
    given: dict[str, Any], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = file(tmp_path, **{"found": directions(1, D), **given})
    with pytest.raises(ValueError, match=message):
        aisteer360.load(path, tiny_model(), **kwargs)


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"directions": {}}', '{"model_type": "llama"}', "{"])
def test_damaged_files_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "v.svec").write_text(content)
    with pytest.raises(ValueError, match=r"v\.svec: damaged or not a steering vector"):
        aisteer360.load(tmp_path / "v", tiny_model())
    with pytest.raises(FileNotFoundError):
        aisteer360.load(tmp_path / "w", tiny_model())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: af.SteerVec.for_model(m, "mlp_out"), "got site 'mlp_out'"),
        (lambda m: af.SteerVec.for_model(m, "residual", positions=[-1]), "positions"),
        (lambda m: af.SteerVec.for_model(m, "residual", [0], [0], generated=True), "generated True"),
        (lambda m: af.SteerVec.for_model(m, "residual", positions=[0]), "layers: got 2, expected -2 to 1"),
        (lambda m: af.SteerVec.stack([af.SteerVec.for_model(m, "residual")] * 2), "got a stack of 2"),
    ],
)
def test_what_the_format_cannot_say_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        aisteer360.save(make(tiny_model()), tmp_path / "v")
    assert not list(tmp_path.iterdir())
