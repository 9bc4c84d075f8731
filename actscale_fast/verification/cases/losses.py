"""Cases of the losses, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..case import Call, Case, Inputs

#: Widths that take every branch of a launch plan: within one block's registers, over a block's shared memory, over
#: clusters of 2 to 16 blocks, and longer than the shared memory of a whole cluster (then a ring of buffers is used).
WIDTHS = (1000, 8192, 32003, 50257, 128256, 262144)
RING = 1_200_003


def intervention_loss(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Widths, rows, strides, answers and options of the hinge, the KL and their gradient."""

    def case(name: str, rows: int, width: int, **options: Any) -> Case:
        scale = options.pop("scale", 3.0)
        reference = inputs.normal(rows, width, scale=scale)
        logits = (reference + inputs.normal(rows, width, scale=scale / 3)).to(inputs.dtype)
        reference = reference.to(inputs.dtype)
        correct = inputs.integers(width, rows)
        wrong = (correct + 1 + inputs.integers(max(width - 1, 1), rows)) % width
        direction = 1.0 - 2.0 * (torch.arange(rows) % 2).float()
        upstream = inputs.normal(2, rows)
        for change in options.pop("changes", ()):
            logits, reference, correct, wrong = change(logits, reference, correct, wrong)
        settings = options.pop("settings", {})
        arguments = (logits, reference, correct, wrong, direction, upstream, settings)
        return Case(name, options.pop("call", _intervention_loss), arguments, options.pop("terms", _of_loss), **options)

    yield case("three columns", 4, 3)
    yield case("odd", 5, 31)
    yield case("unaligned", 3, 1001, offset=1)
    yield case("a slice of columns", 3, 1000, changes=[_sliced])
    yield case("equal rows give exactly 0", 3, 777, changes=[_equal], call=_without_hinge, terms=None)
    yield case("masked columns", 4, 300, changes=[_masked])
    yield case("far apart", 2, 500, changes=[_far])
    yield case("answers at both ends", 2, 513, changes=[_at_the_ends])
    yield case("answers counted", 3, 257, settings={"exclude_answers": False})
    yield case("reverse KL", 3, 2049, settings={"kl": "reverse"})
    yield case("an upstream of 1", 3, 640, call=_intervention_loss_of_ones)
    yield case("weights in the gradient", 3, 641, call=_weighted, terms=_of_weighted)
    yield case("the ℓ1 norm beside it", 2, 128, call=_with_scalars, terms=None)
    yield case("over the logits", 3, 1024, call=_in_place, terms=_of_loss_in_place)
    yield case("no rows", 0, 12)
    options_of_kl: dict[str, dict[str, Any]] = {
        "temperature 2": {"temperature": 2.0},
        "reverse, soft-capped": {"kl": "reverse", "softcap": 5.0},
        "labels": {"labels": torch.tensor([1, -100, 3, -100])},
    }
    for name, settings in options_of_kl.items():
        yield case(f"KL alone, {name}", 4, 999, call=_kl_div, settings=settings, terms=_of_kl)
    for width in (*WIDTHS, RING):
        yield case(f"width {width}", 2, width)
        # All columns count alike, so that one wrong column is as large as the allowed error is small.
        for kl in ("forward", "reverse"):
            flat: dict[str, Any] = {"scale": 0.3, "call": _without_hinge, "terms": _of_kl_alone}
            yield case(f"width {width}, flat rows, {kl} KL", 1, width, settings={"kl": kl}, **flat)
    yield case("more rows than multiprocessors", 2 * multiprocessors + 3, 1536)
    good = case("", 3, 64)
    correct = good.arguments[2].clone().index_fill_(0, torch.tensor([1]), 64)
    bad = (*good.arguments[:2], correct, *good.arguments[3:])
    yield Case("a token id out of range", _intervention_loss, bad, refused_row=1, valid=good.arguments)


def _sliced(logits: Tensor, reference: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
    """Rows of larger rows: their stride is not their width."""
    wide = torch.zeros(len(logits), logits.shape[1] + 13, dtype=logits.dtype)
    wide[:, 5:-8] = logits
    return wide[:, 5:-8], reference, *answers


def _equal(logits: Tensor, reference: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
    return reference.clone(), reference, *answers


def _masked(logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor) -> tuple[Tensor, ...]:
    """−inf on both sides, and in the reference alone."""
    keep = torch.stack([correct, wrong], -1)
    both = (torch.arange(logits.shape[1]) % 7 == 3).expand_as(logits).clone().scatter(1, keep, False)
    one = (torch.arange(logits.shape[1]) % 11 == 5).expand_as(logits).clone().scatter(1, keep, False)
    return logits.masked_fill(both, -torch.inf), reference.masked_fill(both | one, -torch.inf), correct, wrong


def _far(logits: Tensor, reference: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
    """Logits of hundreds: nearly all probability lies on one column."""
    return logits * 40, reference * 40, *answers


def _at_the_ends(logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor) -> tuple[Tensor, ...]:
    return logits, reference, torch.zeros_like(correct), torch.full_like(wrong, logits.shape[1] - 1)


def _losses(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, **settings: Any
) -> Any:
    return ops.intervention_loss(logits, reference, correct, wrong, direction=direction, margin=4.0, **settings)


def _intervention_loss(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    z = logits.detach().requires_grad_()
    losses = _losses(z, reference, correct, wrong, direction, **settings)
    gradient = torch.autograd.grad(losses, z, tuple(upstream.to(losses[0].dtype)))[0]
    return losses[0].detach(), losses[1].detach(), gradient


def _intervention_loss_of_ones(*arguments: Any) -> tuple[Tensor, ...]:
    *rows, upstream, settings = arguments
    call: Call = _intervention_loss
    return call(*rows, torch.ones_like(upstream), settings)


def _weighted(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    z = logits.detach().requires_grad_()
    *losses, loss = _losses(z, reference, correct, wrong, direction, weights=(upstream[0], upstream[1]), **settings)
    return losses[0], losses[1], loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def _without_hinge(*arguments: Any) -> tuple[Tensor, ...]:
    *rows, upstream, settings = arguments
    weights = torch.stack([torch.zeros_like(upstream[0]), torch.ones_like(upstream[0])])
    call: Call = _intervention_loss
    return call(*rows, weights, settings)[1:]


def _with_scalars(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    scalars = upstream.detach().clone()
    scalars[0, :1].zero_()
    scalars.requires_grad_()
    *_, l1 = _losses(logits, reference, correct, wrong, direction, scalars=scalars, **settings)
    return l1.detach(), torch.autograd.grad(l1, scalars)[0]


def _in_place(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    z = logits.detach().requires_grad_()
    losses = _losses(z * 1, reference, correct, wrong, direction, inplace_gradient=True, **settings)
    return losses[0].detach(), torch.autograd.grad(losses, z, tuple(upstream.to(losses[0].dtype)))[0]


def _kl_div(
    logits: Tensor, reference: Tensor, correct: Tensor, wrong: Tensor, direction: Tensor, upstream: Tensor,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    z = logits.detach().requires_grad_()
    divergence = ops.kl_div_from_logits(z, reference, **settings)
    return divergence.detach(), torch.autograd.grad(divergence, z, upstream[0].to(divergence.dtype))[0]


def _of_kl(logits: Tensor, reference: Tensor, *rest: Any) -> tuple[float, ...]:
    """The KL is Σ p·log p − Σ p·log q; each logarithm carries the rounding of its row's largest logit."""
    return _kl_terms(logits, reference, float(rest[3][0].abs().max()) if rest[3].numel() else 0.0)


def _of_loss(logits: Tensor, reference: Tensor, *rest: Any) -> tuple[float, ...]:
    kl, gradient = _kl_terms(logits, reference, float(rest[3].abs().max()) if rest[3].numel() else 0.0)
    return (float(logits.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if logits.numel() else 0.0, kl, gradient)


def _of_weighted(*arguments: Any) -> tuple[float, ...]:
    """The losses are not weighted; their sum and the gradient are."""
    size, _, gradient = _of_loss(*arguments)
    *rest, upstream, settings = arguments
    kl = _of_loss(*rest, torch.ones_like(upstream), settings)[1]
    return size, kl, float(upstream.abs().max()) * (size + kl), gradient


def _of_kl_alone(*arguments: Any) -> tuple[float, ...]:
    logits, reference, *_ = arguments
    return _kl_terms(logits, reference, 1.0)


def _of_loss_in_place(*arguments: Any) -> tuple[float, ...]:
    return _of_loss(*arguments)[::2]


def _kl_terms(logits: Tensor, reference: Tensor, upstream: float) -> tuple[float, float]:
    if not logits.numel():
        return 0.0, 0.0
    log_p, log_q = (side.log_softmax(-1).nan_to_num(neginf=0.0) for side in (reference, logits))
    size = 1 + log_p.abs() + log_q.abs()
    p, q = log_p.exp(), log_q.exp()
    spread = (p * size).sum(-1).max(), ((p + q) * size * (1 + (q * size).sum(-1, keepdim=True))).max()
    return float(spread[0]), float(spread[1]) * upstream


def linear_softmax(inputs: Inputs, multiprocessors: int) -> Iterator[Case]:
    """Shapes, biases and options of the loss from hidden states."""

    def case(name: str, rows: int, width: int, vocab: int, **options: Any) -> Case:
        hidden, other = (inputs.activations(rows, width) for _ in range(2))
        weight = inputs.activations(vocab, width, scale=2 * width**-0.5)
        bias = inputs.normal(vocab) if options.pop("biased", False) else None
        correct = inputs.integers(vocab, rows)
        wrong = (correct + 1) % vocab
        direction = 1.0 - 2.0 * (torch.arange(rows) % 2).float()
        settings = options.pop("settings", {})
        arguments = (hidden, other, weight, bias, correct, wrong, direction, inputs.normal(2, rows), settings)
        return Case(name, _linear_loss, arguments, _of_linear_loss, **options)

    yield case("odd", 3, 5, 31)
    yield case("unaligned", 3, 64, 200, offset=1)
    yield case("a bias", 4, 48, 513, biased=True)
    yield case("a soft-cap", 3, 32, 300, settings={"softcap": 5.0})
    yield case("answers counted", 3, 33, 257, settings={"exclude_answers": False})
    yield case("many rows", 131, 24, 1030)
    yield case("a whole vocabulary", 3, 64, 32003)


def _linear_loss(
    hidden: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, correct: Tensor, wrong: Tensor,
    direction: Tensor, upstream: Tensor, settings: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    h = hidden.detach().requires_grad_()
    answers = {key: value for key, value in settings.items() if key == "exclude_answers"}
    if "softcap" in settings:
        answers["softcap"] = settings["softcap"]
    reference = ops.reference_statistics(other, weight, correct, wrong, bias=bias, **answers)
    losses = ops.linear_intervention_loss(
        h, weight, reference, correct, wrong, direction=direction, margin=4.0, bias=bias, **settings
    )
    gradient = torch.autograd.grad(losses, h, tuple(upstream.to(losses[0].dtype)))[0]
    return losses[0].detach(), losses[1].detach(), gradient


def _of_linear_loss(hidden: Tensor, other: Tensor, weight: Tensor, *rest: Any) -> tuple[float, ...]:
    """A logit carries the rounding of the magnitudes that make it."""
    size = 1 + float(torch.stack([(h.abs() @ weight.abs().t()).max() for h in (hidden, other)]).max())
    return size, 2 * size, 2 * size * float(weight.abs().max()) * float(rest[4].abs().max())
