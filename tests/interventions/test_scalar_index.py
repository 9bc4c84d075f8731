"""`scalars[layer, head]`, `.top()` and `.to_frame()`: scalars by the model's own numbers."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import actscale_fast as af


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


@pytest.fixture
def scalars(model: Any) -> af.ActivScalar:
    """Layers 0 and 2 of 3, with α = 0.1, 0.2, … in the stored order."""
    made = af.ActivScalar.for_model(model, layers=[0, 2])
    with torch.no_grad():
        made.alpha.copy_(0.1 * torch.arange(1.0, 9.0).view(2, 1, 4))
    return made


def test_an_index_names_the_models_layer_and_head(scalars: af.ActivScalar) -> None:
    assert scalars[2, 1] == pytest.approx(0.6)
    assert isinstance(scalars[2, 1], float)
    assert scalars[-1, -1] == scalars[2, 3] == pytest.approx(0.8)
    assert torch.equal(scalars[2], scalars.alpha[1, 0].detach())
    assert torch.equal(scalars[:, 1], scalars.alpha[:, 0, 1].detach())
    assert torch.equal(scalars[1:, 1:4:2], scalars.alpha[1:, 0, 1:4:2].detach())
    assert torch.equal(scalars[[2, 0], 3], scalars.alpha[[1, 0], 0, 3].detach())


def test_positions_and_groups_are_named_too(model: Any, scalars: af.ActivScalar) -> None:
    at = af.ActivScalar.for_model(model, "mlp_out", positions=[0, -1], generated=True)
    at[1, -1], at[1, "generated"] = 3.0, 2.0
    assert at.alpha[1, :, 0].tolist() == [0, 3, 2]
    assert at[1].tolist() == [0, 3, 2]
    heads = af.ActivScalar.for_model(model, positions=[0, -1])
    heads[2, 3, 0] = 5.0
    assert heads.alpha[2, 0, 3] == heads[2, 3, 0] == 5.0
    assert heads[2].shape == (4, 2)  # in the order of the index: head, position
    both = af.stack([scalars, -1.0 * scalars])
    assert both[1, 2, 3] == -both[0, 2, 3] == -scalars[2, 3]
    assert {row.group for row in both.top(2)} == {0, 1}


def test_a_slice_is_a_view_and_a_list_is_a_copy(scalars: af.ActivScalar) -> None:
    scalars[2][3] = 7.0
    assert scalars[2, 3] == 7.0
    scalars[2] *= 2
    assert scalars[2, 3] == 14.0
    scalars[[0, 2], 0].zero_()
    assert scalars[0, 0] == pytest.approx(0.1)


@pytest.mark.parametrize("value", [1.5, np.float32(1.5), torch.tensor(1.5), [[1.5] * 2] * 2, np.full((2, 2), 1.5)])
def test_setting_writes_in_place_and_nowhere_else(scalars: af.ActivScalar, value: Any) -> None:
    before, parameter = scalars.alpha.detach().clone(), scalars.alpha
    scalars[[2, 0], 1:3] = value
    before[:, :, 1:3] = 1.5
    assert scalars.alpha is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter.detach(), before)


def test_a_patch_that_is_on_uses_the_new_value(model: Any) -> None:
    scalars = af.ActivScalar.for_model(model)
    ids = torch.tensor([[4, 5, 6, 11]])
    with torch.no_grad(), af.patch(model, scalars):
        before = model(ids).logits
        scalars[1, 2] = -1.0
        after = model(ids).logits
    fresh = af.ActivScalar.for_model(model)
    fresh[1, 2] = -1.0
    with torch.no_grad(), af.patch(model, fresh):
        expected = model(ids).logits
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ((1, 0), IndexError, "layer: got 1, but the intervention holds layers 0, 2"),
        ((3, 0), IndexError, "layer: got 3, but"),
        ((-4, 0), IndexError, "layer: got -4, but"),
        ((slice(1, 2), 0), IndexError, "layer: got 1:2, but"),
        ((0, 4), IndexError, "head: got 4, expected -4 to 3"),
        ((0, slice(None, None, -1)), IndexError, "pass a list"),
        ((0, slice(9, None)), IndexError, "names none"),
        ((0, 1, 0), IndexError, r"got 3 indices, expected at most \[layer, head\]"),
        ((0, 1.0), TypeError, "head: got 1.0, expected a number"),
        ((True, 1), TypeError, "layer: got True"),
        (("head", 1), TypeError, "layer: got 'head'"),
        ((..., 1), TypeError, "layer: got Ellipsis"),
    ],
)
def test_an_index_that_is_not_held_is_named(
    scalars: af.ActivScalar, index: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scalars[index]
    with pytest.raises(error, match=message):
        scalars[index] = 1.0


def test_a_position_that_is_not_held_is_named(model: Any) -> None:
    at = af.ActivScalar.for_model(model, "mlp_out", positions=[0, -1])
    with pytest.raises(IndexError, match=r"position: got 1, but the intervention holds \[0, -1\]"):
        at[0, 1]
    with pytest.raises(TypeError, match=r"position: got 1\.5"):
        at[0, 1.5]
    with pytest.raises(IndexError, match="expected at most"):
        af.ActivScalar.for_model(model, "mlp_out")[0, 0]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError), (1e300, ValueError), ([1.0, 2.0, 3.0], ValueError), ("1", TypeError),
        (True, TypeError), (None, TypeError), (torch.tensor([True]), TypeError), (1j, TypeError),
    ],
)  # fmt: skip
def test_only_finite_numbers_of_the_chosen_shape_are_set(
    scalars: af.ActivScalar, value: Any, error: type[Exception]
) -> None:
    before = scalars.alpha.detach().clone()
    with pytest.raises(error, match="value: got"):
        scalars[0] = value
    assert torch.equal(scalars.alpha.detach(), before)


def test_scalars_are_not_iterated_by_layer_numbers(scalars: af.ActivScalar) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(scalars)


def test_the_largest_come_first_and_zeros_are_left_out(scalars: af.ActivScalar) -> None:
    scalars[2, 0] = -9.0
    scalars[0] = 0.0
    assert [(row.layer, row.head, row.position) for row in scalars.top(2)] == [(2, 0, None), (2, 3, None)]
    assert scalars.top(1)[0].value == -9.0
    assert len(scalars.top(100)) == 4
    with pytest.raises(ValueError, match="k: got 0"):
        scalars.top(0)


def test_a_frame_has_every_scalar(scalars: af.ActivScalar, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = scalars.to_frame()
    assert list(frame.columns) == ["layer", "head", "position", "value"]
    assert frame["layer"].tolist() == [0] * 4 + [2] * 4
    assert frame["value"].tolist() == scalars.alpha.flatten().tolist()
    assert "group" in af.stack([scalars, scalars]).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        scalars.to_frame()
