"""Quantised models beside plain twins with the same weights, and what each public function gives on both.

    python tests/helpers/quantised_cases.py

prints the table of docs/quantised.md, for the libraries that are installed.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from fit_cases import conflicts, interrupted_at
from torch import Tensor, nn

import actscale_fast as af

OBJECTIVE = af.Objective(margin=2.0, faithfulness=0.7, minimality=0.01)
SETTINGS: dict[str, Any] = {"steps": 4, "lr": 0.05, "batch_size": 4, "progress": False}
FEW, OTHERS = conflicts(7), conflicts(5, seed=4)


def plain_model() -> Any:
    """A small model whose widths every quantiser takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=64, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def from_transformers(config: Callable[[], Any], seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    plain = plain_model()
    if seed:
        with torch.no_grad():
            plain.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(), dtype=torch.float32, device_map="cpu"
        ).eval()


def bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name: str, **options: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**options))


def quanto(weights: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


def hqq(bits: int, seed: int = 0) -> Any:
    """By hand, because transformers 5 does not load hqq yet."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = plain_model()
    if seed:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    for layer in model.model.layers:
        for part, names in (
            (layer.self_attn, "q_proj k_proj v_proj o_proj"),
            (layer.mlp, "gate_proj up_proj down_proj"),
        ):
            for name in names.split():
                made = HQQLinear(getattr(part, name), config, compute_dtype=torch.float32, device="cpu")
                setattr(part, name, made)
    return model


#: name -> (the package to import, a function of a seed that makes the model)
QUANTISERS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "bitsandbytes 8 bits": (
        "bitsandbytes", lambda seed: from_transformers(lambda: bitsandbytes(load_in_8bit=True), seed)
    ),
    "bitsandbytes 4 bits": (
        "bitsandbytes",
        lambda seed: from_transformers(
            lambda: bitsandbytes(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            seed,
        ),
    ),
    "torchao int8 weights": ("torchao", lambda seed: from_transformers(lambda: torchao("Int8WeightOnlyConfig"), seed)),
    "torchao fp8 weights": (
        "torchao", lambda seed: from_transformers(lambda: torchao("Float8WeightOnlyConfig"), seed)
    ),
    "torchao int8 weights and activations": (
        "torchao", lambda seed: from_transformers(lambda: torchao("Int8DynamicActivationInt8WeightConfig"), seed)
    ),
    "torchao int4 weights": (
        "torchao", lambda seed: from_transformers(lambda: torchao("Int4WeightOnlyConfig", group_size=64), seed)
    ),
    "quanto int8": ("optimum.quanto", lambda seed: from_transformers(lambda: quanto("int8"), seed)),
    "quanto int4": ("optimum.quanto", lambda seed: from_transformers(lambda: quanto("int4"), seed)),
    "hqq 8 bits": ("hqq", lambda seed: hqq(8, seed)),
    "hqq 4 bits": ("hqq", lambda seed: hqq(4, seed)),
}  # fmt: skip
#: Relative difference from the twin that the quantiser's own arithmetic explains: LLM.int8 and dynamic quantisation
#: round activations, and the kernels of the others dequantise in another order.
TOLERANCE = {"bitsandbytes 8 bits": 0.08, "torchao int8 weights and activations": 0.08}


class CannotLoadError(Exception):
    """The quantiser itself does not work on this machine."""


def quantised(name: str, seed: int = 0) -> Any:
    """The model of a quantiser; `seed` other than 0: with one weight changed.

    Raises:
        ImportError: the package is missing.
        CannotLoadError: it does not work here.
    """
    package, make = QUANTISERS[name]
    importlib.import_module(package)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(seed).requires_grad_(False)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise CannotLoadError(f"{type(error).__name__}: {reason}") from error


def twin_of(model: Any) -> Any:
    """A plain model with the weights that a quantised one stands for: what its layers make of unit vectors."""
    twin = plain_model().requires_grad_(False)
    for name, part in twin.named_modules():
        if isinstance(part, nn.Linear):
            layer = model.get_submodule(name)
            weight = getattr(layer, "weight", None)
            exact = type(weight) is nn.Parameter and weight.is_floating_point()
            part.weight.data.copy_(weight if exact else dense(layer, part.in_features))
        elif next(part.parameters(recurse=False), None) is not None:
            part.load_state_dict(model.get_submodule(name).state_dict())
    return twin


def dense(layer: nn.Module, width: int) -> Tensor:
    """The weight of a quantised layer."""
    units = torch.eye(width, requires_grad=True)  # without a gradient, bitsandbytes would repack its weights
    return layer(units).detach().T


def start(model: Any) -> af.ActivScalar:
    scalars = af.ActivScalar.for_model(model)
    with torch.no_grad():
        scalars.alpha.copy_(torch.linspace(-0.4, 0.6, scalars.alpha.numel()).view_as(scalars.alpha))
    return scalars


def tokens(model: Any) -> Tensor:
    return torch.tensor([[4, 5, 6, 8, 7, 9], [5, 6, 7, 8, 9, 4]])


def patched(model: Any) -> Tensor:
    with torch.no_grad(), af.patch(model, start(model)):
        return model(tokens(model)).logits.float()


def generated(model: Any) -> Tensor:
    with torch.no_grad(), af.patch(model, start(model)):
        return model.generate(tokens(model), max_new_tokens=4, do_sample=False, pad_token_id=0).float()


def evaluated(model: Any) -> Tensor:
    found = af.evaluate(model, tiny.tokenizer(), OTHERS, start(model))
    return torch.tensor([found.logit_difference, found.logit_difference_inverted, found.kl_correct, found.kl_wrong])


def fitted(model: Any, **options: Any) -> Tensor:
    scalars = af.ActivScalar.for_model(model)
    af.fit(model, tiny.tokenizer(), FEW, scalars, OBJECTIVE, **SETTINGS | options)
    return scalars.alpha.detach().clone()


def swept(model: Any) -> Tensor:
    result = af.sweep(model, tiny.tokenizer(), FEW, {"seed": [0, 1]}, OBJECTIVE, **SETTINGS)
    return torch.stack([fit.intervention.alpha.detach() for fit in result.fits])  # type: ignore[attr-defined]


def attributed(model: Any) -> Tensor:
    found = af.attribution(model, tiny.tokenizer(), OTHERS, knock_out=False)
    return found.scores.float()


def merged(model: Any) -> Tensor:
    af.merge(model, af.ActivScalar.for_model(model))
    return model(tokens(model)).logits.float()


def with_adapter(model: Any) -> Tensor:
    """A fit on the model with a LoRA adapter whose weights are not 0."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in sorted(adapted.named_parameters()):
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return fitted(adapted.eval())


def resumed(name: str) -> str:
    """An interrupted fit, continued to the bits of an uninterrupted one; refused on other weights."""
    model = kept(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.safetensors"
        with interrupted_at(2):
            fitted(model, checkpoint=path)
        try:
            fitted(kept(name, 1), checkpoint=path)
            return "WRONG: continued on another model's weights"
        except ValueError as error:
            if "belongs to another fit: model" not in str(error):
                raise
        assert torch.equal(fitted(model, checkpoint=path), fitted(model))
    return "right"


FUNCTIONS: dict[str, Callable[[Any], Tensor]] = {
    "patch": patched, "generate": generated, "evaluate": evaluated, "attribution": attributed, "fit": fitted,
    "sweep": swept, "fit beside a LoRA adapter": with_adapter, "merge": merged,
}  # fmt: skip


@functools.cache
def kept(name: str, seed: int = 0) -> Any:
    return quantised(name, seed)


@functools.cache
def expected(name: str, function: str) -> Tensor:
    return FUNCTIONS[function](twin_of(kept(name)))


def outcome(name: str, function: str) -> str:
    """ "right" (as the twin, within the quantiser's own rounding), "refused: …", or "WRONG: …"."""
    try:
        if function == "resume":
            return resumed(name)
        changes = function.startswith(("merge", "fit beside"))
        found = FUNCTIONS[function](quantised(name) if changes else kept(name))
    except (RuntimeError, ValueError) as error:
        refusal = str(error).startswith("model: ")
        return f"{'refused' if refusal else 'WRONG'}: {' '.join(str(error).split())}"
    wanted = expected(name, function)
    error = float((found - wanted).norm() / wanted.norm())
    return "right" if error <= TOLERANCE.get(name, 2e-3) else f"WRONG: off by {error:.2g} of its norm"


def main() -> None:
    functions = [*FUNCTIONS, "resume"]
    print(f"| quantiser | {' | '.join(functions)} |\n|---{'|---' * len(functions)}|")
    notes: list[str] = []
    for name in QUANTISERS:
        try:
            kept(name)
        except (ImportError, CannotLoadError) as error:
            print(f"| {name} | not loaded: {error} |{' |' * (len(functions) - 1)}", flush=True)
            continue
        cells = [outcome(name, function) for function in functions]
        notes += [f"{name}, {f}: {cell}" for f, cell in zip(functions, cells, strict=True) if cell != "right"]
        print(f"| {name} | {' | '.join(cell.split(':')[0] for cell in cells)} |", flush=True)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
