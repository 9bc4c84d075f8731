"""The ops as PyTorch sees them: schemas, fakes, autograd registration, and one graph under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import Backend, Inputs, over
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from actscale_fast import ops

#: A compiler sees an op's schema and fake, and no kernel: one kernel stands for all, except in one test.
COMPILED = ["reference", "cpu"] + ["triton", "cuda"] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """A graph compiled for one backend is not reused for the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss_arguments(inputs: Inputs, device: torch.device, **changes: Any) -> tuple[Any, ...]:
    """Positional arguments of the op actscale::intervention_loss."""
    rows = inputs.rows(5, 37).to(device)
    values = {
        "logits": rows.logits.requires_grad_(), "reference_logits": rows.reference, "correct": rows.correct,
        "wrong": rows.wrong, "direction": rows.direction, "scalars": None, "margin": 1.5, "inverse_temperature": 1.0,
        "exclude_answers": True, "reverse": False, "need_grad": True, "row_weight": None, "softcap": None,
        "gradient_weight": None,
    }  # fmt: skip
    return tuple({**values, **changes}.values())


def scaling_arguments(inputs: Inputs, device: torch.device) -> tuple[Any, ...]:
    x, alpha, shift = inputs.normal(3, 4, 2, 8), inputs.normal(2, 1, 2), inputs.normal(2, 4, 2, 8)
    leaves = (value.to(device).requires_grad_() for value in (x, alpha, shift))
    return (*leaves, 1.0, inputs.normal(3).to(device), torch.tensor([1, 0, 1], device=device))


def dynamic_arguments(inputs: Inputs, device: torch.device) -> tuple[Any, ...]:
    leaves = [inputs.normal(*s).to(device).requires_grad_() for s in ((3, 4, 2, 8), (2, 2, 8), (2, 2))]
    return (*leaves, 1.0, inputs.normal(3).to(device), torch.tensor([1, 0, 1], device=device))


# The ops of the backward passes and the optimizer step have no gradient of their own; their other checks all apply.
@over(backends=["cpu"] + ["triton"] * torch.cuda.is_available())
def test_opcheck_passes_for_every_op(backend: Backend, inputs: Inputs) -> None:
    device = backend.device
    library = torch.ops.actscale
    scaling = scaling_arguments(inputs, device)
    torch.library.opcheck(library.scale_heads.default, scaling)
    torch.library.opcheck(library.scale_heads.default, (scaling[0], scaling[1], None, -1.0, None, scaling[5]))
    detached = [value.detach() if isinstance(value, Tensor) else value for value in scaling]
    dy = inputs.normal(3, 4, 2, 8).to(device)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(library.scale_heads_backward.default, (dy, *detached, *needs))
    dynamic = dynamic_arguments(inputs, device)
    torch.library.opcheck(library.dynamic_scale.default, dynamic)
    torch.library.opcheck(library.dynamic_scale.default, (*dynamic[:2], None, -1.0, None, dynamic[5]))
    detached = [value.detach() if isinstance(value, Tensor) else value for value in dynamic]
    alpha = inputs.normal(3, 4, 2).to(device)
    for d_scalars, needs in ((alpha, (True, True, True)), (None, (False, True, False)), (alpha, (True, False, False))):
        given = (dy, d_scalars, *detached[:2], alpha, *detached[3:], *needs)
        torch.library.opcheck(library.dynamic_scale_backward.default, given)
    scalars = inputs.normal(1, 3, 2).to(device).requires_grad_()
    weights = inputs.normal(5, 2).to(device)
    options: list[dict[str, Any]] = [{"scalars": scalars}, {"reverse": True}, {"exclude_answers": False}]
    for changes in (*options, {"gradient_weight": weights}):
        torch.library.opcheck(library.intervention_loss.default, loss_arguments(inputs, device, **changes))
    plain = loss_arguments(inputs, device, correct=None, wrong=None, direction=None, exclude_answers=False)
    torch.library.opcheck(library.intervention_loss.default, plain)
    torch.library.opcheck(
        library.intervention_loss.default, (*plain[:-3], inputs.normal(5).abs().to(device), 4.0, None)
    )
    inference = [v.detach() if isinstance(v, Tensor) else v for v in loss_arguments(inputs, device, need_grad=False)]
    torch.library.opcheck(library.intervention_loss.default, tuple(inference))
    rows = inputs.rows(5, 37).to(device)
    upstream, answer_grad = (inputs.normal(5).to(device) for _ in range(2)), inputs.normal(5, 3).to(device)
    scale = (rows.logits, *upstream, rows.correct, rows.wrong, answer_grad)
    torch.library.opcheck(library.intervention_loss_scale_.default, scale)
    hidden, weight, bias = (inputs.normal(*shape).to(device) for shape in ((5, 8), (37, 8), (37,)))
    softmax = (hidden, weight, bias, rows.correct, rows.wrong, True, 0.5, 1 << 20)
    torch.library.opcheck(library.linear_softmax.default, softmax)
    torch.library.opcheck(library.linear_softmax.default, (hidden, weight, None, None, None, False, 1.0, 1 << 20))
    adam = [inputs.normal(6).to(device) for _ in range(3)] + [inputs.normal(6).abs().to(device)]
    step = torch.zeros((), device=device)
    torch.library.opcheck(library.proximal_adam_.default, (*adam, step, 0.1, 0.9, 0.999, 1e-8, 0.01))


def assert_compiles_to_the_same(
    call: Callable[..., Tensor], make: Callable[[int], tuple[list[Tensor], list[Any]]], *, compiler: str
) -> None:
    """`call(*leaves, *rest)`, compiled into one graph, gives eager's value and gradients at several batch sizes."""
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    # By default dynamic=True takes floats (a margin, a scale) for symbols too, finds that the ops want numbers, and
    # traces everything again; the tests of the default compiler show that this works.
    with torch._dynamo.config.patch(specialize_float=compiler == "aot_eager"):
        for rows in (3, 5, 8):
            leaves, rest = make(rows)
            results = []
            for function in (call, compiled):
                value = function(*leaves, *rest)
                results.append([value.detach(), *torch.autograd.grad(value, leaves)])
            for got, expected in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@over()
def test_scale_heads_compiles_into_one_graph_for_every_batch_size(backend: Backend, inputs: Inputs) -> None:
    def call(x: Tensor, alpha: Tensor, shift: Tensor, strength: Tensor, group: Tensor, weight: Tensor) -> Tensor:
        y = ops.scale_heads(x * 2.0, alpha, strength=strength, shift=shift, group=group)
        return (y * weight).sum()

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        leaves = [inputs.normal(rows, 4, 3, 8), inputs.normal(2, 1, 3), inputs.normal(2, 1, 3, 8)]
        rest = [inputs.normal(rows), inputs.integers(2, rows), inputs.normal(rows, 4, 3, 8)]
        return [t.to(backend.device).requires_grad_() for t in leaves], [t.to(backend.device) for t in rest]

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


@over(backends=COMPILED)
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_dynamic_scale_compiles_into_one_graph_for_every_batch_size(
    backend: Backend, penalty: float, inputs: Inputs
) -> None:
    def call(x: Tensor, probe: Tensor, bias: Tensor, strength: Tensor, group: Tensor, weight: Tensor) -> Tensor:
        if not penalty:
            return (ops.dynamic_scale(x * 2.0, probe, bias, strength=strength, group=group) * weight).sum()
        y, alpha = ops.dynamic_scale(x * 2.0, probe, bias, strength=strength, group=group, return_scalars=True)
        return (y * weight).sum() + penalty * alpha.abs().sum()

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        leaves = [inputs.normal(rows, 4, 3, 8), inputs.normal(2, 3, 8, scale=0.3), inputs.normal(2, 3)]
        rest = [inputs.normal(rows), inputs.integers(2, rows), inputs.normal(rows, 4, 3, 8)]
        return [t.to(backend.device).requires_grad_() for t in leaves], [t.to(backend.device) for t in rest]

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


@over(backends=COMPILED)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_intervention_loss_compiles_into_one_graph_for_every_batch_size(
    backend: Backend, kl: Any, inputs: Inputs
) -> None:
    def call(logits: Tensor, scalars: Tensor, reference: Tensor, c: Tensor, w: Tensor, s: Tensor, u: Tensor) -> Tensor:
        options: dict[str, Any] = {"direction": s, "margin": 2.0, "kl": kl, "scalars": scalars}
        e, f, l1 = ops.intervention_loss(logits.sin() * 4, reference, c, w, **options)
        return (e * u).sum() + (f * u).mean() + 0.1 * l1

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        made = inputs.rows(rows, 37).to(backend.device)
        scalars = inputs.normal(2, 3).to(backend.device)
        leaves = [made.logits.requires_grad_(), scalars.requires_grad_()]
        return leaves, [*made[1:], inputs.normal(rows).to(backend.device)]

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


@over(backends=COMPILED)
def test_a_gradient_in_place_compiles_into_one_graph_and_leaves_the_logits_alone(
    backend: Backend, inputs: Inputs
) -> None:
    rows = inputs.rows(4, 37).to(backend.device)

    def call(logits: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        made = logits * 1.0
        e, f = ops.intervention_loss(
            made, rows.reference, rows.correct, rows.wrong, direction=rows.direction, inplace_gradient=inplace
        )
        return (e + f).sum(), made

    leaf = rows.logits.clone().requires_grad_()
    value, made = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, True)
    expected, _ = call(leaf, False)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], torch.autograd.grad(expected, leaf)[0])
    assert torch.equal(made, rows.logits)


@over(backends=COMPILED)
def test_kl_div_compiles_into_one_graph_for_every_batch_size(backend: Backend, inputs: Inputs) -> None:
    def call(logits: Tensor, reference: Tensor) -> Tensor:
        return ops.kl_div_from_logits(logits * 0.5, reference, temperature=2.0, reduction="batchmean")

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        made = inputs.rows(rows, 41).to(backend.device)
        return [made.logits.requires_grad_()], [made.reference]

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


@over(backends=COMPILED)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_divergence_of_labelled_rows_compiles_into_one_graph_for_every_batch_size(
    backend: Backend, reduction: Any, inputs: Inputs
) -> None:
    def call(logits: Tensor, reference: Tensor, labels: Tensor, weight: Tensor, plain: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": 2.0, "softcap": 4.0, "reduction": reduction}
        value = ops.kl_div_from_logits(logits * 0.5, reference, labels=labels, row_weight=weight, **options)
        return value.sum() + ops.kl_div_from_logits(logits, plain, reduction=reduction).sum()

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        made = inputs.rows(rows, 41).to(backend.device)
        made.reference[1] = torch.nan
        labels = torch.where(torch.arange(rows) == 1, -100, 5).to(backend.device)
        weight = inputs.normal(rows).abs().to(backend.device)
        return [made.logits.requires_grad_()], [
            made.reference,
            labels,
            weight,
            inputs.rows(rows, 41).to(backend.device).logits,
        ]

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


HEADS: dict[str, dict[str, Any]] = {
    "statistics": {"logit_scale": 0.5},
    "softcap": {"softcap": 5.0},
    "reverse": {"kl": "reverse"},
}


@pytest.mark.parametrize("options", HEADS)
@over(backends=COMPILED)
def test_losses_from_hidden_states_compile_into_one_graph_for_every_batch_size(
    backend: Backend, options: str, inputs: Inputs
) -> None:
    check_losses_from_hidden_states(backend, options, inputs)


# The graph holds the same ops for all kernels.
@over(backends=["triton", "cuda"])
def test_losses_from_hidden_states_compile_over_the_other_kernels(backend: Backend, inputs: Inputs) -> None:
    check_losses_from_hidden_states(backend, "statistics", inputs)


def check_losses_from_hidden_states(backend: Backend, options: str, inputs: Inputs) -> None:
    """The frozen model's statistics and the steered model's losses in one graph, and the gradient of both inputs."""
    weight, bias = (inputs.normal(*shape).to(backend.device) for shape in ((41, 8), (41,)))

    def call(hidden: Tensor, scalars: Tensor, frozen: Tensor, c: Tensor, w: Tensor, s: Tensor, u: Tensor) -> Tensor:
        head: dict[str, Any] = {"bias": bias, **HEADS[options]}
        reference = ops.reference_statistics(frozen.sin(), weight, c, w, **head)
        e, f, l1 = ops.linear_intervention_loss(
            hidden * 1.5, weight, reference, c, w, direction=s, margin=2.0, scalars=scalars, **head
        )
        return (e * u).sum() + (f * u).mean() + 0.1 * l1

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        made = inputs.rows(rows, 41).to(backend.device)
        hidden, frozen, scalars, u = (
            inputs.normal(*shape).to(backend.device) for shape in ((rows, 8), (rows, 8), (2, 3), (rows,))
        )
        rest = [frozen, made.correct, made.wrong, made.direction, u]
        for tensor in (hidden, *rest):
            torch._dynamo.mark_dynamic(tensor, 0)
        return [hidden.requires_grad_(), scalars.requires_grad_()], rest

    assert_compiles_to_the_same(call, make, compiler="aot_eager")


@over(backends=COMPILED)
def test_a_head_that_learns_compiles_into_one_graph(backend: Backend, inputs: Inputs) -> None:
    rows, hidden, frozen = inputs.rows(6, 41), inputs.normal(6, 8), inputs.normal(6, 8)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reference = ops.reference_statistics(frozen, weight, rows.correct, rows.wrong, bias=bias)
        e, f = ops.linear_intervention_loss(
            hidden, weight, reference, rows.correct, rows.wrong, direction=rows.direction, bias=bias, chunk_bytes=2000
        )
        return (e + 2 * f).sum()

    leaves = [t.requires_grad_() for t in (hidden, inputs.normal(41, 8), inputs.normal(41))]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, call))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"kl": "reverse"}, {"learned": True}], ids=str)
@over(backends=COMPILED)
def test_tensors_without_values_go_through_every_loss(
    backend: Backend, options: dict[str, Any], inputs: Inputs
) -> None:
    """Under FakeTensorMode only shapes and dtypes are computed: nothing may look at an id."""
    how = {name: value for name, value in options.items() if name != "learned"}
    with FakeTensorMode():
        hidden, weight, ids = torch.randn(4, 8, requires_grad=True), torch.randn(41, 8), torch.arange(4)
        weight.requires_grad_("learned" in options)
        answers, direction = (ids, ids + 1), torch.ones(4)
        reference = ops.reference_statistics(hidden.detach(), weight, *answers, **how)
        losses = ops.linear_intervention_loss(hidden, weight, reference, *answers, direction=direction, **how)
        logits = hidden @ weight.t()
        losses += ops.intervention_loss(
            logits, logits.detach(), *answers, direction=direction, inplace_gradient=True, kl=how.get("kl", "forward")
        )
        (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), hidden)
    assert [tuple(loss.shape) for loss in losses] == [(4,)] * 4
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert (gradient.shape, gradient.dtype) == (hidden.shape, hidden.dtype)


@over(backends=COMPILED)
def test_statistics_made_outside_a_compiled_step_serve_inside_it(backend: Backend, inputs: Inputs) -> None:
    rows, weight = inputs.rows(6, 41), inputs.normal(41, 8)
    hidden, upstream = inputs.normal(6, 8), inputs.normal(6)
    reference = ops.reference_statistics(hidden, weight, rows.correct, rows.wrong)

    def step(hidden: Tensor) -> Tensor:
        e, f = ops.linear_intervention_loss(
            hidden, weight, reference, rows.correct, rows.wrong, direction=rows.direction, margin=2.0
        )
        return ((e + f) * upstream).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for moved in (hidden, hidden + 0.3 * inputs.normal(6, 8)):
        leaf = moved.clone().requires_grad_()
        value, expected = compiled(leaf), step(leaf)
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)
        gradients = [torch.autograd.grad(v, leaf)[0] for v in (value, expected)]
        torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@over(backends=COMPILED)
def test_scaling_and_loss_together_pass_the_default_compiler(backend: Backend, inputs: Inputs) -> None:
    def call(x: Tensor, alpha: Tensor, weight: Tensor, reference: Tensor, c: Tensor, w: Tensor, s: Tensor) -> Tensor:
        hidden = ops.scale_heads(x, alpha, strength=s)[:, -1].flatten(1)
        e, f, l1 = ops.intervention_loss(hidden @ weight, reference, c, w, direction=s, margin=2.0, scalars=alpha)
        return e.mean() + f.mean() + 0.1 * l1

    weight = inputs.normal(24, 37, scale=0.3)

    def make(rows: int) -> tuple[list[Tensor], list[Any]]:
        made = inputs.rows(rows, 37)
        leaves = [inputs.normal(rows, 4, 3, 8).requires_grad_(), inputs.normal(1, 1, 3).requires_grad_()]
        return leaves, [weight, *made[1:]]

    assert_compiles_to_the_same(call, make, compiler="inductor")


@over(backends=COMPILED)
def test_the_proximal_step_compiles_into_one_graph(backend: Backend, inputs: Inputs) -> None:
    def update(*state: Tensor) -> None:
        ops.proximal_adam_(*state, lr=0.1, l1=0.02)

    start = [inputs.normal(9), inputs.normal(9), torch.zeros(9), torch.zeros(9), torch.zeros(())]
    states = [[t.clone() for t in start] for _ in range(2)]
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        update(*states[0])
        compiled(*states[1])
    for got, expected in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert float(states[1][4]) == 2.0


@over(backends=COMPILED)
def test_a_compiled_graph_gives_the_same_gradient_twice(backend: Backend, inputs: Inputs) -> None:
    """Eager autograd may write over the stored gradient, a compiled graph that is run again must not see that."""
    rows = inputs.rows(4, 29).to(backend.device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses(logits: Tensor) -> tuple[Tensor, ...]:
        return ops.intervention_loss(logits, rows.reference, rows.correct, rows.wrong, direction=rows.direction)

    logits, upstream = rows.logits.detach().requires_grad_(), inputs.normal(4).to(backend.device)
    results = [torch.autograd.grad(losses(logits), logits, (upstream, upstream * 3))[0] for _ in range(2)]
    with torch._functorch.config.patch(donated_buffer=False):  # what PyTorch asks for before a graph may be kept
        torch.compiler.reset()
        kept = losses(logits)
        for _ in range(2):
            results.append(torch.autograd.grad(kept, logits, (upstream, upstream * 3), retain_graph=True)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])
