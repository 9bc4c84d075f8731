"""linear_kl_div: the KL of two models from their hidden states, its gradients, and the memory that it takes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, Backend, Inputs, error_of, over
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from actscale_fast import ops
from actscale_fast.ops.losses import linear_kl_passes
from benchmarks.memory import peak_bytes

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of −inf − −inf in Triton's interpreter
]

CPU = torch.device("cpu")
CHUNK_BYTES = 1 << 20


class Models(NamedTuple):
    """A student, and a teacher of another width over the same tokens."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    bias: Tensor  # [V]
    reference_hidden: Tensor  # [N, d₂]
    reference_weight: Tensor  # [V, d₂]
    reference_bias: Tensor  # [V]

    def learned(self) -> Models:
        leaves = [t.detach().requires_grad_() for t in self[:3]]
        return Models(*leaves, *self[3:])

    def loss(self, **options: Any) -> Tensor:
        h, w, b, rh, rw, rb = self
        return ops.linear_kl_div(h, w, rh, rw, bias=b, reference_bias=rb, **options)


def models(
    inputs: Inputs, backend: Backend | None, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> Models:
    n_rows, vocab, d, other = shape
    sizes = ((n_rows, d), (vocab, d), (vocab,), (n_rows, other), (vocab, other), (vocab,))
    scales = (1.0, 2 / d**0.5, 1.0, 1.0, 2 / other**0.5, 1.0)
    made = (inputs.normal(*size, scale=scale).to(dtype) for size, scale in zip(sizes, scales, strict=True))
    return Models(*(t.to(backend.device if backend else CPU) for t in made))


class Exact(NamedTuple):
    values: Tensor  # [N]
    gradients: list[Tensor]  # of Σ upstream·values by hidden, weight, bias


def textbook(
    m: Models, upstream: Tensor, dtype: torch.dtype, *, temperature: float = 1.0, kl: str = "forward",
    softcap: float | None = None, logit_scale: float = 1.0, rounded: torch.dtype | None = None,
) -> Exact:  # fmt: skip
    """By the definition, every step in `dtype`; with `rounded` logits and their gradient are of that dtype, as a
    16-bit model's are. In float32 this is eager PyTorch."""
    wide = [t.detach().cpu().to(dtype).requires_grad_() for t in m]

    def logits(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = h @ w.t() + b
        if rounded is not None:
            z = z.to(rounded).to(dtype)
        z = z * logit_scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    log_q, log_p = ((logits(*side) / temperature).log_softmax(-1) for side in (wide[:3], wide[3:]))
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if kl == "reverse":
        terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    values = terms.sum(-1)
    return Exact(values.detach(), list(torch.autograd.grad((values * upstream.cpu().to(dtype)).sum(), wide[:3])))


def assert_close_to_exact(got: Tensor, exact: Tensor, eager: Tensor, n_terms: int) -> None:
    """Twice eager's error, and roundings of sums of `n_terms` products at the size of the largest result."""
    assert got.shape == exact.shape
    error = (eager.double() - exact).abs().max()
    step = torch.finfo(got.dtype).eps + 16 * torch.finfo(torch.float32).eps * n_terms**0.5
    allowed = 2 * error + step * exact.abs().max()
    assert (got.detach().cpu().double() - exact).abs().max() <= allowed


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kl": "reverse", "temperature": 2.0},
    {"softcap": 3.0, "logit_scale": 0.5},
    {"kl": "reverse", "softcap": 3.0, "logit_scale": 2.0, "temperature": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 28])
@over()
def test_values_and_all_gradients_are_as_exact_as_eager(
    backend: Backend, chunk_bytes: int, options: dict[str, Any], inputs: Inputs
) -> None:
    m = models(inputs, backend, (5, 67, 12, 7)).learned()
    upstream = inputs.normal(5).to(backend.device)
    exact, eager = (textbook(m, upstream, dtype, **options) for dtype in (torch.float64, torch.float32))
    values = m.loss(chunk_bytes=chunk_bytes, **options)
    assert values.dtype == torch.float32
    assert_close_to_exact(values, exact.values, eager.values, 12)
    for got, wanted, plain in zip(
        torch.autograd.grad(values, m[:3], upstream), exact.gradients, eager.gradients, strict=True
    ):
        assert_close_to_exact(got, wanted, plain, 67)


@over(dtypes=[torch.bfloat16, torch.float16], backends=["reference", "cpu", "cuda"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_16_bit_heads_round_their_logits_as_models_do_and_add_gradients_up_in_float32(
    backend: Backend, dtype: torch.dtype, softcap: float | None, inputs: Inputs
) -> None:
    m = models(inputs, backend, (40, 131, 12, 7), dtype).learned()
    upstream = torch.ones(40, device=backend.device)
    exact = textbook(m, upstream, torch.float64, softcap=softcap)
    eager = textbook(m, upstream, torch.float32, softcap=softcap, rounded=dtype)
    value = m.loss(reduction="sum", softcap=softcap, chunk_bytes=2000)
    assert abs(float(value.detach()) - float(exact.values.sum())) <= 2 * float(
        (eager.values - exact.values).abs().sum()
    )
    for got, wanted, plain in zip(torch.autograd.grad(value, m[:3]), exact.gradients, eager.gradients, strict=True):
        assert got.dtype == dtype
        assert_close_to_exact(got, wanted, plain, 131)


@over(dtypes=[torch.float16, torch.bfloat16], backends=["reference", "cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_16_bit_heads_get_a_mean_whose_sum_their_dtype_does_not_hold(
    backend: Backend, dtype: torch.dtype, reduction: str, inputs: Inputs
) -> None:
    """Σ dPᵀ·h of 2000 rows is more than float16 holds, 1/2000 of a row's gradient less than it keeps digits of."""
    n_rows = 2000
    m = models(inputs, backend, (n_rows, 11, 4, 3), dtype)
    m.hidden[:, 0], m.weight[:, 0], m.bias[0] = 400.0, 0.0, 3.0
    m = m.learned()
    factor = torch.full((n_rows,), 1 / n_rows, device=backend.device)
    exact = textbook(m, factor, torch.float64)
    eager = textbook(m, factor, torch.float32, rounded=dtype)
    assert exact.gradients[1].abs().max() * n_rows > torch.finfo(torch.float16).max
    value = m.loss(reduction=reduction)
    gradients = torch.autograd.grad(value, m[:3], factor if reduction == "none" else None)
    for got, wanted, plain in zip(gradients, exact.gradients, eager.gradients, strict=True):
        assert_close_to_exact(got, wanted, plain, n_rows)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@over(dtypes=[torch.float32, torch.float16], backends=["reference", "cpu", "cuda"])
def test_an_ignored_row_has_no_gradient_whatever_its_upstream_is(
    backend: Backend, dtype: torch.dtype, learns: bool, inputs: Inputs
) -> None:
    """The square root of a loss of 0 sends inf back."""
    m = models(inputs, backend, (4, 31, 8, 5), dtype)
    leaves = [t.requires_grad_() for t in (m[:3] if learns else m[:1])]
    labels = torch.tensor([3, -100, 5, -100], device=backend.device)
    d_hidden, *of_head = torch.autograd.grad(m.loss(labels=labels).sqrt().sum(), leaves)
    assert not d_hidden[[1, 3]].any()
    assert all(g.isfinite().all() and g.any() for g in (d_hidden, *of_head))
    nan = torch.tensor(torch.nan, device=backend.device)
    d_hidden, *of_head = torch.autograd.grad(m.loss(labels=labels, reduction="sum"), leaves, nan)
    assert not d_hidden[[1, 3]].any()
    assert all(g.isnan().all() for g in (d_hidden[[0, 2]], *of_head))


@over()
def test_reductions_are_those_of_the_loss_from_logits(backend: Backend, inputs: Inputs) -> None:
    m = models(inputs, backend, (6, 41, 8, 8))
    labels = torch.tensor([[1, -100, 3], [-100, 5, 6]], device=backend.device)
    weight = inputs.normal(2, 1).abs().to(backend.device)
    given: dict[str, Any] = {"labels": labels, "row_weight": weight, "temperature": 1.5}
    shaped = m._replace(hidden=m.hidden.view(2, 3, 8), reference_hidden=m.reference_hidden.view(2, 3, 8)).learned()
    z, r = (F.linear(*side) for side in (shaped[:3], shaped[3:]))
    for reduction in ("none", "sum", "mean", "batchmean"):
        got = shaped.loss(reduction=reduction, **given)
        wanted = ops.kl_div_from_logits(z, r, reduction=reduction, **given)
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        upstream = inputs.normal(1, *got.shape)[0].to(backend.device)
        gradients = [torch.autograd.grad(v, shaped[:3], upstream, retain_graph=True) for v in (got, wanted)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@over(dtypes=[torch.float32, torch.bfloat16], backends=["reference", "cpu", "cuda"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 28])
def test_ignored_rows_may_hold_anything_and_count_nothing(
    backend: Backend, dtype: torch.dtype, reduction: str, chunk_bytes: int, inputs: Inputs
) -> None:
    m = models(inputs, backend, (7, 41, 8, 5), dtype)
    labels = torch.tensor([1, -100, 3, -100, 5, 6, -100], device=backend.device)
    kept = labels != -100
    wild = m._replace(hidden=m.hidden.clone(), reference_hidden=m.reference_hidden.clone())
    wild.hidden[1], wild.reference_hidden[1], wild.hidden[3], wild.reference_hidden[6] = (
        torch.nan,
        torch.inf,
        torch.inf,
        torch.nan,
    )
    results = []
    for some, options in (
        (wild, {"labels": labels}), (m._replace(hidden=m.hidden[kept], reference_hidden=m.reference_hidden[kept]), {})
    ):  # fmt: skip
        some = some.learned()
        value = some.loss(reduction=reduction, chunk_bytes=chunk_bytes, **options)
        results.append([value, *torch.autograd.grad(value.sum(), some[:3])])
    (value, d_hidden, *head), (few, d_few, *head_of_few) = results
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(value[kept] if reduction == "none" else value, few, **tolerance)
    assert not d_hidden[~kept].any()
    torch.testing.assert_close(d_hidden[kept], d_few, **tolerance)
    for one, other in zip(head, head_of_few, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@over(backends=["reference", "cpu"])
def test_ignored_rows_are_left_out_of_the_matrix_products(
    backend: Backend, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def linear(x: Tensor, *head: Tensor) -> Tensor:
        rows.append(len(x))
        return F.linear(x, *head)

    monkeypatch.setattr(linear_kl_passes, "F", type("Counting", (), {"linear": staticmethod(linear)}))
    m = models(inputs, backend, (20, 41, 8, 5)).learned()
    labels = torch.full((20,), -100)
    labels[3:7] = 2
    m.loss(labels=labels, reduction="sum").backward()
    assert rows == [4, 4]


@over()
def test_the_same_head_over_the_same_states_gives_exactly_zero(backend: Backend, inputs: Inputs) -> None:
    m = models(inputs, backend, (6, 41, 8, 8)).learned()
    for options in ({}, {"kl": "reverse", "softcap": 3.0}):
        value = ops.linear_kl_div(m.hidden, m.weight, m.hidden.detach(), bias=m.bias, **options)
        assert not value.any()
        gradients = torch.autograd.grad(value.sum(), m[:3])
        for gradient in gradients:
            assert gradient.abs().max() <= (2e-6 if backend.name == "reference" else 0)


@over(backends=["reference", "cpu"])
def test_only_what_requires_a_gradient_gets_one(backend: Backend, inputs: Inputs) -> None:
    m = models(inputs, backend, (6, 41, 8, 5))
    leaves = m.learned()
    for reduction in ("none", "mean"):
        expected = torch.autograd.grad(leaves.loss(reduction=reduction).sum(), leaves[:3])
        for index, wanted in enumerate(expected):
            some = [t.detach() for t in m]
            some[index].requires_grad_()
            value = Models(*some).loss(reduction=reduction)
            torch.testing.assert_close(torch.autograd.grad(value.sum(), some[index])[0], wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        value = leaves.loss(reduction="sum")
    assert not value.requires_grad
    torch.testing.assert_close(value, leaves.loss(reduction="sum").detach())


@over(backends=["reference", "cpu"])
def test_a_kept_graph_gives_each_upstream_its_own_gradient_and_a_freed_one_says_so(
    backend: Backend, inputs: Inputs
) -> None:
    m = models(inputs, backend, (6, 41, 8, 5)).learned()
    value = m.loss(reduction="mean")
    first, other, again = (
        torch.autograd.grad(value, m[:3], torch.tensor(u), retain_graph=True) for u in (1.0, -3.0, 1.0)
    )
    for a, b, c in zip(first, other, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, -3 * a)
    torch.autograd.grad(value, m[:3])
    with pytest.raises(RuntimeError, match="a second backward needs retain_graph=True"):
        torch.autograd.grad(value, m[:3])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_float64_passes_gradcheck(reduction: str, options: dict[str, Any], inputs: Inputs) -> None:
    m = models(inputs, None, (4, 9, 3, 2), torch.float64)
    labels, weight = torch.tensor([1, -100, 2, 3]), inputs.normal(4, dtype=torch.float64)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return Models(h, w, b, *m[3:]).loss(
            reduction=reduction, labels=labels, row_weight=weight, chunk_bytes=3000, **options
        )

    assert torch.autograd.gradcheck(loss, m.learned()[:3])


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "kl": "reverse"}], ids=str)
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "half of the rows"])
@over(dtypes=[torch.float32, torch.bfloat16], backends=["reference", "cpu"])
def test_memory_stays_within_the_chunk_beside_the_gradients_and_the_sum_of_a_16_bit_head(
    backend: Backend, dtype: torch.dtype, learns: bool, ignored: bool, options: dict[str, Any], inputs: Inputs
) -> None:
    m = models(inputs, backend, (400, 3001, 16, 24), dtype)
    leaves = [t.requires_grad_() for t in (m[:3] if learns else m[:1])]
    if ignored:
        options = {**options, "labels": torch.arange(400).remainder(2) * 100 - 100}

    def step() -> tuple[Tensor, ...]:
        value = m.loss(reduction="mean", chunk_bytes=CHUNK_BYTES, **options)
        return torch.autograd.grad(value, leaves)

    results = bytes_of(*step())
    if learns and dtype != torch.float32:
        results += 4 * (m.weight.numel() + m.bias.numel())  # beside the gradients: dW in float32, until it is rounded
    of_rows = 400 * 64
    # PyTorch's own products: with AMX they take a copy of the weight, which the chunks cannot bound.
    logits = torch.zeros(400, 3001, dtype=dtype)
    copied = sum(
        peak_bytes(functools.partial(torch.mm, logits, w, out=torch.empty(400, w.shape[1], dtype=dtype)), CPU)
        for w in (m.weight.detach(), m.reference_weight)
    )
    peak = peak_bytes(step, CPU)
    assert peak <= CHUNK_BYTES + results + of_rows + copied
    assert peak >= CHUNK_BYTES / 4  # nor are the chunks much smaller than they may be
    whole = 400 * 3001 * m.hidden.element_size()
    assert whole > CHUNK_BYTES


@over(backends=["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("chunk_bytes", [20_000, 1 << 28])
def test_it_compiles_into_one_graph(backend: Backend, reduction: str, chunk_bytes: int, inputs: Inputs) -> None:
    torch.compiler.reset()
    m, labels = models(inputs, backend, (6, 41, 8, 5)).learned(), torch.tensor([1, -100, 3, 4, -100, 6])
    m.reference_hidden[1] = torch.nan

    def call(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value = Models(h * 1.5, w, b, *m[3:]).loss(
            reduction=reduction, labels=labels, softcap=4.0, logit_scale=0.5, chunk_bytes=chunk_bytes
        )
        return value.square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [[f(*m[:3]), *torch.autograd.grad(f(*m[:3]), m[:3])] for f in (compiled, call)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)
    torch.compiler.reset()


@over(dtypes=[torch.float32, torch.bfloat16], backends=["cpu"])
def test_a_graph_makes_the_logits_of_the_tensors_dtype_under_autocast_and_adds_gradients_up_in_float32(
    backend: Backend, dtype: torch.dtype, inputs: Inputs
) -> None:
    torch.compiler.reset()
    m = models(inputs, backend, (600, 41, 8, 5), dtype)
    m = m._replace(hidden=m.hidden + 4).learned()  # sums that grow: 16 bits lose the last parts of such
    size = 3500 * m.hidden.element_size()  # eight chunks
    compiled = torch.compile(
        lambda h, w, b: Models(h, w, b, *m[3:]).loss(reduction="sum", chunk_bytes=size), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    one = torch.ones(600)
    exact = textbook(m, one, torch.float64)
    eager = textbook(m, one, torch.float32, rounded=None if dtype == torch.float32 else dtype)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(compiled(*m[:3]), m[:3])
    for got, wanted, plain in zip(gradients, exact.gradients, eager.gradients, strict=True):
        assert got.dtype == dtype
        assert_close_to_exact(got, wanted, plain, 600)
    torch.compiler.reset()


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@over(dtypes=[torch.float32, torch.bfloat16], backends=["cpu"])
def test_the_memory_of_a_graph_stays_within_the_chunk_too(
    backend: Backend, dtype: torch.dtype, learns: bool, inputs: Inputs
) -> None:
    torch.compiler.reset()
    m = models(inputs, backend, (400, 3001, 16, 24), dtype)
    leaves = [t.requires_grad_() for t in (m[:3] if learns else m[:1])]
    compiled = torch.compile(
        lambda h, w, b: Models(h, w, b, *m[3:]).loss(reduction="mean", chunk_bytes=CHUNK_BYTES), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(compiled(*m[:3]), leaves)

    results = bytes_of(*step())
    if learns:  # the sum over chunks beside a chunk's part; of 16 bits the head and the sum in float32
        results += (2 if dtype == torch.float32 else 4) * 4 * m.weight.numel()
    peak = peak_bytes(step, CPU)
    assert peak <= CHUNK_BYTES + results + 400 * 64
    torch.compiler.reset()


@over(backends=["reference", "cpu"])
def test_tensors_without_values_go_through(backend: Backend) -> None:
    with FakeTensorMode():
        hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)
        labels = torch.zeros(2, 3, dtype=torch.int64)
        value = ops.linear_kl_div(hidden, weight, hidden.detach(), labels=labels)
        gradients = torch.autograd.grad(value.sum(), (hidden, weight))
    assert value.shape == (2, 3)
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape]


@over(backends=["cpu"])
def test_autocast_leaves_the_products_as_their_tensors_are(backend: Backend, inputs: Inputs) -> None:
    m = models(inputs, backend, (6, 41, 8, 5)).learned()
    plain = torch.autograd.grad(m.loss(reduction="sum"), m[:3])
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(m.loss(reduction="sum"), m[:3])
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@over()
def test_errors_name_the_argument_what_came_and_what_was_expected(backend: Backend, inputs: Inputs) -> None:
    m = models(inputs, backend, (3, 31, 8, 5))
    here = m.hidden.device
    whole = m._asdict()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"hidden": [1.0]}, TypeError, "hidden: got list, expected a floating-point tensor [..., d]"),
        ({"hidden": m.hidden[:, :0]}, ValueError, "hidden: got shape (3, 0), expected [..., d]"),
        ({"weight": m.weight[:, 1:]}, ValueError, "weight: got shape (31, 7), expected [V, 8]"),
        (
            {"weight": m.weight.double()}, TypeError,
            "weight: got dtype torch.float64, expected torch.float32 as hidden has",
        ),
        ({"weight": m.weight.to("meta")}, ValueError, f"weight: got a tensor on meta, expected one on {here}"),
        ({"bias": m.bias[1:]}, ValueError, "bias: got shape (30,), expected (31,)"),
        ({"reference_bias": 1.0}, TypeError, "reference_bias: got float, expected a floating-point tensor [V]"),
        ({"reference_weight": m.weight}, ValueError, "reference_weight: got shape (31, 8), expected [V, 5]"),
        (
            {"reference_weight": m.reference_weight[1:], "reference_bias": None}, ValueError,
            "reference_weight: got 30 tokens, expected 31 as weight has",
        ),
        (
            {"reference_weight": None}, ValueError,
            "reference_bias: got one without reference_weight, whose head's it is; expected None",
        ),
        (
            {"reference_weight": None, "reference_bias": None}, ValueError,
            "reference_weight: got shape (31, 8), expected [V, 5]",
        ),
        (
            {"reference_hidden": m.reference_hidden[:2]}, ValueError,
            "reference_hidden: got shape (2, 5), expected [3, 'd'] as hidden has",
        ),
        (
            {"reference_hidden": m.reference_hidden.double(), "reference_weight": m.reference_weight.double()},
            TypeError, "reference_hidden: got dtype torch.float64, expected torch.float32 as hidden has",
        ),
        (
            {"reference_hidden": m.reference_hidden.clone().requires_grad_()}, ValueError,
            "reference_hidden: requires a gradient, but the reference is a constant; detach it",
        ),
        ({"temperature": -1.0}, ValueError, "temperature: got -1.0, expected a positive number"),
        ({"softcap": 0}, ValueError, "softcap: got 0, expected a positive number"),
        ({"logit_scale": 0}, ValueError, "logit_scale: got 0, expected a positive number"),
        (
            {"logit_scale": float("inf")}, ValueError,
            "logit_scale: got inf, expected a positive number that float32 holds",
        ),
        (
            {"logit_scale": 1e30, "temperature": 1e-30}, ValueError,
            "logit_scale / temperature: got 1e+60, expected a positive number that float32 holds",
        ),
        (
            {"logit_scale": 1e-30, "softcap": 1e30}, ValueError,
            "softcap / logit_scale: got 1e+60, expected a positive number that float32 holds",
        ),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes: got 0, expected a positive integer"),
        (
            {"reduction": "max"}, ValueError,
            "reduction: got 'max', expected 'none', 'sum', 'mean' or 'batchmean'",
        ),
        ({"kl": "both"}, ValueError, "kl: got 'both', expected 'forward' or 'reverse'"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, "labels: got shape (4,), expected (3,)"),
    ]  # fmt: skip
    for changes, kind, message in cases:
        assert error_of(lambda c=changes: ops.linear_kl_div(**{**whole, **c}), kind) == message


@over(dtypes=DTYPES, backends=["reference", "cpu", "cuda"])
def test_no_rows_give_no_losses_and_empty_gradients(backend: Backend, dtype: torch.dtype, inputs: Inputs) -> None:
    m = models(inputs, backend, (0, 31, 8, 5), dtype).learned()
    for reduction in ("none", "sum", "mean"):
        value = m.loss(reduction=reduction)
        assert not value.any()
        gradients = torch.autograd.grad(value.sum(), m[:3])
        assert [g.shape for g in gradients] == [t.shape for t in m[:3]]
        assert not any(g.any() for g in gradients)
