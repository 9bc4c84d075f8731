"""PEFT's (IA)³ layers: its own forward beside the fused one, and a training step of a small model.

X is the activation's size. PEFT moves 10X forward and 18X backward before a projection (feed-forward) and 6X and 17X
behind it, with a float32 adapter on a bfloat16 model; the least is 2X and 3X. Of one dtype it moves 2X forward, which
is the least, and 6X backward. The layer settings leave the projection itself out: its product is the same in both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..case import Call, Case, Problem, Setting, Variant, generator, kernel_backends
from ..models import Shape, random_model

SHAPE = Shape(layers=4, heads=8, head_dim=64, vocab=256, dtype=torch.bfloat16, kv_heads=2, inner=1536)
ROWS, TOKENS = 4, 256
BOTH = {"bfloat16, adapter float32": (torch.bfloat16, torch.float32), "float32": (torch.float32, torch.float32)}


class Projection(nn.Module):
    """What PEFT adapts: one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.o_proj = nn.Linear(width, width, bias=False)


def layer_of(width: int, feedforward: bool, factors: Tensor) -> Any:
    """PEFT's (IA)³ layer with these factors, around nothing."""
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"] if feedforward else [])
    model = get_peft_model(Projection(width), config)
    layer = model.base_model.model.o_proj
    layer.base_layer = nn.Identity()
    layer.ia3_l["default"].data = factors.view_as(layer.ia3_l["default"])
    return layer


def one_layer(
    width: int, feedforward: bool, dtypes: tuple[torch.dtype, torch.dtype], backward: bool, device: torch.device
) -> Problem:
    from actscale_fast.integrations.peft import accelerate

    normal, resources = generator(), contextlib.ExitStack()
    x, dy = (normal(ROWS, TOKENS, width).to(device, dtypes[0]) for _ in range(2))
    x.requires_grad_()
    factors = (1 + normal(width, scale=0.3)).to(device, dtypes[1])
    stock, fast = (layer_of(width, feedforward, factors) for _ in range(2))
    resources.enter_context(accelerate(fast))
    resources.callback(torch.compiler.reset)  # a setting's graphs are no other's

    def run(layer: Any, factors: nn.Parameter) -> Call:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (layer(x),)

        def both() -> tuple[Tensor, ...]:
            y = layer(x)
            return (y.detach(), *(g.view(y.shape[-1] if g.dim() == 2 else y.shape) for g in gradients(y)))

        def gradients(y: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, factors), dy)

        return both if backward else forward

    def exact() -> tuple[Tensor, ...]:
        wide, weight, upstream = (t.detach().double() for t in (x, factors, dy))
        if not backward:
            return (wide * weight,)
        return wide * weight, upstream * weight, (wide * upstream).sum((0, 1))

    def terms() -> tuple[float, ...]:
        """y and dx are products; a factor's gradient is a sum of one a row and token."""
        size = float((x.detach().double() * dy.double()).abs().sum((0, 1)).max())
        return (0.0, 0.0, size) if backward else (0.0,)

    calls = {name: run(layer, layer.ia3_l["default"]) for name, layer in (("eager", stock), ("fast", fast))}
    compiled = run(torch.compile(stock, dynamic=False), stock.ia3_l["default"])
    variants = [Variant("eager", calls["eager"]), Variant("torch.compile", compiled)]
    variants += [Variant(f"actscale_fast {name}", calls["fast"], name) for name in kernel_backends(device)]
    passes = 5 if backward else 2
    return Problem(
        variants, exact, passes * x.numel() * x.element_size(), passes * x.numel(), terms, resources=resources
    )  # fmt: skip


def training_step(dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of SGD on the modules that PEFT chooses by itself: keys, values and the MLP's inner width."""
    from peft import IA3Config, get_peft_model

    from actscale_fast.integrations.peft import accelerate

    resources = contextlib.ExitStack()
    config = IA3Config(task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):
        stock = get_peft_model(random_model(SHAPE, device).to(dtype), config)
    for number, factors in enumerate(p for n, p in stock.named_parameters() if "ia3_l" in n):
        factors.data += generator(number)(*factors.shape, scale=0.2).to(device)
    fast = copy.deepcopy(stock)
    resources.enter_context(accelerate(fast))
    ids = torch.randint(SHAPE.vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)

    def run(model: Any, lr: float = 1e-3) -> Call:
        learned = [p for p in model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in learned]
        optimizer = torch.optim.SGD(learned, lr)

        def step() -> tuple[Tensor, ...]:
            with torch.no_grad():  # every step is the first one
                torch._foreach_copy_(learned, start)
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return loss.detach(), torch.cat([p.grad.flatten() for p in learned if p.grad is not None])

        return step

    def exact() -> tuple[Tensor, ...]:
        return run(copy.deepcopy(stock).double())()

    variants = [Variant("eager", run(stock))]
    variants += [Variant(f"actscale_fast {name}", run(fast), name) for name in kernel_backends(device)]
    weights = sum(p.numel() * p.element_size() for p in stock.parameters())
    return Problem(variants, exact, 3 * weights, flops=0, dtype=dtype, resources=resources)


def case() -> Case:
    settings = []
    for name, dtypes in BOTH.items():
        for feedforward in (True, False):
            for backward in (False, True):
                for width in (2048, 256):
                    passes = "forward + backward" if backward else "forward"
                    label = f"{'before' if feedforward else 'behind'} o_proj, width {width}, {name}, {passes}"
                    gain = backward or dtypes[0] != dtypes[1]
                    settings.append(
                        Setting(
                            label,
                            functools.partial(one_layer, width, feedforward, dtypes, backward),
                            note="" if gain else "Nothing to gain: PEFT's one product moves 2X already.",
                            quick=feedforward and (backward or not gain) and (gain or width == 2048),
                        )
                    )
    for dtype in (torch.bfloat16, torch.float32):
        settings.append(
            Setting(
                f"training step, 4 layers of width 512, {str(dtype)[6:]}, adapter float32",
                functools.partial(training_step, dtype),
                note="Matrix products are most of a step.",
                quick=dtype == torch.bfloat16,
            )
        )
    return Case("peft", f"PEFT (IA)³: {ROWS} × {TOKENS} tokens", settings, counted=True)
