"""Gates of the literature: equal to what one writes with hooks and PyTorch alone, in values and gradients."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import IDS, logits, randomised, tiny_model
from torch import Tensor, nn

import actscale_fast as af
from actscale_fast.architectures.layout import layout
from actscale_fast.integrations.causal_head_gating import HeadGates, fit_gates, gated_nll, scored
from actscale_fast.integrations.jola import JoLA

FAMILIES = ["llama", "gpt2", "gemma2"]
L, H, W = 2, 4, 8  # of the tiny models but gemma2: layers, heads, head dimension


@contextlib.contextmanager
def plain_hooks(model: nn.Module, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """`edit(layer, heads [B, T, H, D])` on the input of every attention's output projection."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, args: (edit(layer, args[0].unflatten(-1, (H, -1))).flatten(-2),)

    handles = [m.register_forward_pre_hook(hook(layer)) for layer, m in enumerate(layout(model).projections)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def labelled(seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right; the last one or two of their tokens have labels."""
    ids, mask, labels = IDS.clone(), torch.ones_like(IDS), torch.full_like(IDS, -100)
    ids[1, 5:], mask[1, 5:] = 0, 0
    labels[0, 4:], labels[1, 4], labels[2, 5] = ids[0, 4:], ids[1, 4], ids[2, 5]
    ids[2] = ids[2].roll(seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_nll(model: Any, gates: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Nam et al.: gates on the heads, logits of all tokens, the shifted cross-entropy of the labelled ones."""
    with plain_hooks(model, lambda layer, heads: heads * gates[layer][:, None].to(heads.dtype)):
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(found[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_gates_and_its_gradient_are_the_plain_ones(family: str) -> None:
    model, batch = tiny_model(family, dtype=torch.float64), labelled()
    theta = torch.randn(L, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = plain_nll(model, theta.sigmoid(), batch)
    expected_gradient = torch.autograd.grad(expected, theta)[0]
    with af.ops.use_backend("reference"), af.head_mask(model, torch.ones(L, H)) as handle:
        got = gated_nll(model, handle, theta.sigmoid(), batch, scored(batch))
        gradient = torch.autograd.grad(got, theta)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)  # the loss is made in float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(("family", "contrastive"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_the_three_fits_are_those_of_a_plain_loop(family: str, contrastive: bool) -> None:
    model, batches = tiny_model(family), [labelled(), labelled(1)]
    forget = [labelled(3)] if contrastive else []
    found = fit_gates(model, batches, steps=4, lr=0.3, weight=0.2, clip=2.5, start=2.0, forget=forget)
    fits: list[Tensor] = []
    for pressure in (0.0, 0.2, -0.2):
        theta = (fits[0] if fits else torch.full((L, H), 2.0)).clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=0.3)
        for step in range(4):
            optimizer.zero_grad()
            loss = plain_nll(model, theta.sigmoid(), batches[step % 2]) - pressure * theta.clamp(-2.5, 2.5).mean()
            for batch in forget:
                loss = loss - plain_nll(model, theta.sigmoid(), batch)
            loss.backward(inputs=[theta])
            optimizer.step()
        fits.append(theta.detach())
    for got, expected in zip((found.free, found.opened, found.closed), fits, strict=True):
        assert got.shape == (L, H)
        torch.testing.assert_close(got, expected.sigmoid(), rtol=1e-3, atol=1e-4)


def test_heads_that_stay_open_under_pressure_are_those_the_labels_need() -> None:
    model, batch = tiny_model(), labelled()
    found = fit_gates(model, [batch], steps=40, lr=0.3, weight=1.0)
    assert found.closed.mean() < found.free.mean() < found.opened.mean()
    role = torch.stack(list(found.roles.values())).argmax(0)  # 0 facilitating, 1 interfering, 2 irrelevant
    assert set(role.unique().tolist()) >= {0, 2}
    with torch.no_grad(), af.head_mask(model, found.opened) as handle:
        whole, without_needed, without_irrelevant = (
            float(gated_nll(model, handle, found.opened * keep, batch, scored(batch)))
            for keep in (torch.ones(L, H), role != 0, role != 2)
        )
    assert without_needed - whole > 2 * abs(without_irrelevant - whole)


def test_a_role_is_what_a_gate_resists() -> None:
    roles = HeadGates(*torch.tensor([[[0.5, 0.5, 0.5]], [[1.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]])).roles
    assert {name: value.tolist() for name, value in roles.items()} == {
        "facilitating": [[1, 0, 0]], "interfering": [[0, 1, 0]], "irrelevant": [[0, 0, 1]],
    }  # fmt: skip


def test_a_fit_of_gates_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_gates(model, [labelled()], steps=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in module.__dict__ and not module._forward_pre_hooks for module in model.modules())


def test_a_batch_without_labels_is_refused() -> None:
    batch = labelled()
    batch["labels"][:, 1:] = -100
    with pytest.raises(ValueError, match="labels: got only -100 after the first column"):
        fit_gates(tiny_model(), [batch], steps=1)


def jola(model: Any, seed: int = 2, **kwargs: Any) -> JoLA:
    made = JoLA.for_model(model, **kwargs)
    randomised(made, seed)
    with torch.no_grad():  # some gates closed, some open, most between
        made.scale_gates.mul_(2)
        made.vector_gates.mul_(2)
    return made


def plain_gates(log_alpha: Tensor, sampled: bool) -> Tensor:
    """Louizos et al., eq. 10 to 12 and 13, with the constants of JoLA."""
    if sampled:
        noise = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + log_alpha) / 0.33)
    else:
        concrete = torch.sigmoid(log_alpha)
    return torch.clamp(concrete * (1.1 - -0.1) - 0.1, 0, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_jola_and_its_gradients_are_the_plain_ones(family: str, sampled: bool, strength: float) -> None:
    model = tiny_model(family, dtype=torch.float64)
    ours = jola(model).train(sampled)
    weights = torch.randn(logits(model).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with af.ops.use_backend("reference"), af.patch(model, ours, strength=strength):
        torch.manual_seed(11)
        got = model(IDS).logits
        (got * weights).sum().backward()
    plain = {name: value.detach().clone()[:, 0].requires_grad_() for name, value in ours.named_parameters()}

    def edit(layer: int, heads: Tensor) -> Tensor:
        a = plain["scales"][layer] * plain_gates(plain["scale_gates"][layer], sampled)[:, None]  # [H, D]
        v = plain["vectors"][layer] * plain_gates(plain["vector_gates"][layer], sampled)[:, None]  # [H, D]
        return heads * (1 + strength * a.double()) + strength * v.double()

    torch.manual_seed(11)
    with plain_hooks(model, edit):
        expected = model(IDS).logits
    (expected * weights).sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got, logits(model), atol=1e-2)
    for name, value in ours.named_parameters():
        assert value.grad is not None
        assert plain[name].grad is not None
        torch.testing.assert_close(value.grad[:, 0], plain[name].grad, rtol=1e-4, atol=1e-4)


def test_jola_does_nothing_at_first_and_gates_of_evaluation_do_not_change() -> None:
    model = tiny_model()
    before = logits(model)
    fresh = JoLA.for_model(model)
    with af.patch(model, fresh):
        assert torch.equal(logits(model), before)
    ours = jola(model)
    with af.patch(model, ours):
        assert torch.equal(logits(model), logits(model))
        ours.train()
        assert not torch.equal(logits(model), logits(model))


def test_the_expected_l0_is_the_frequency_of_open_gates() -> None:
    ours = jola(tiny_model()).train()
    with torch.no_grad():
        log_alpha = torch.stack([ours.scale_gates, ours.vector_gates])
        torch.manual_seed(3)
        n = 20_000
        open_share = (ours.gate(log_alpha.expand(n, *log_alpha.shape)) > 0).double().mean(0)
    p = ours.open_probabilities()
    assert p.shape == (2, L, 1, H)
    assert ((open_share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_closed_gates_are_exactly_no_edit_and_open_ones_the_whole() -> None:
    model = tiny_model()
    ours, whole = jola(model), randomised(af.SteerVec.for_model(model))
    with torch.no_grad():
        ours.vectors.copy_(whole.vectors)  # type: ignore[operator]
        ours.scale_gates.fill_(-4.0)  # σ(−4) = 0.018, stretched below 0
        ours.vector_gates.fill_(4.0)
    with af.patch(model, whole):
        expected = logits(model)
    with af.patch(model, ours):
        assert torch.equal(logits(model), expected)


def test_pressure_on_the_expected_l0_closes_gates_that_the_loss_does_not_need() -> None:
    model, target = tiny_model().requires_grad_(False), tiny_model(seed=4)
    ours, wanted = JoLA.for_model(model).train(), logits(target).softmax(-1)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.05)
    torch.manual_seed(0)
    losses = []
    with af.patch(model, ours):
        for _ in range(40):
            loss = F.kl_div(model(IDS).logits.log_softmax(-1), wanted, reduction="batchmean")
            optimizer.zero_grad()
            (loss + 3.0 * ours.open_probabilities().sum()).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    start = 1 / (1 + math.exp(0.33 * math.log(0.1 / 1.1)))
    assert ours.open_probabilities().mean() < start


def test_jola_is_saved_stacked_and_placed_as_any_intervention(tmp_path: Path) -> None:
    model = tiny_model()
    ours = jola(model, positions=[0, -1], generated=True)
    ours.save_pretrained(tmp_path)
    back = af.load_intervention(tmp_path)
    assert isinstance(back, JoLA)
    read = "import sys, actscale_fast as af; print(type(af.load_intervention(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", read, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "JoLA\n", done.stderr  # in a process that has not imported its module
    assert not back.training
    other = jola(model, seed=9, positions=[0, -1], generated=True)
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = []
    for one in (back, other):
        with af.patch(model, one):
            alone.append((logits(model), model.generate(IDS[:1], **given)))
    with af.patch(model, JoLA.stack([ours, other]), group=torch.tensor([0, 1, 0])):
        together = logits(model)
    for row, of in enumerate([0, 1, 0]):
        torch.testing.assert_close(together[row], alone[of][0][row], rtol=1e-5, atol=1e-5)
    everywhere, betas = jola(model), torch.tensor([0.5, -1.0, 0.0])
    with af.patch(model, everywhere, strength=betas):
        by_row = logits(model)
    for row, beta in enumerate(betas.tolist()):
        with af.patch(model, everywhere, strength=beta):
            torch.testing.assert_close(by_row[row], logits(model)[row], rtol=1e-5, atol=1e-5)
    with af.patch(model, ours):
        assert torch.equal(model.generate(IDS[:1], **given), alone[0][1])
