"""`--quantize`: how transformers quantises a model's weights when it loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..demo_model import quiet_transformers

#: What the option takes, and the package that has to be installed for it.
PACKAGES = {
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-fp8": "torchao",
    "quanto-int8": "optimum-quanto",
    "quanto-int4": "optimum-quanto",
}


def quantization_config(name: str) -> Any:
    """The configuration for `from_pretrained(quantization_config=…)`.

    Raises:
        ImportError: the package is missing, which is named.
    """
    from transformers import BitsAndBytesConfig, QuantoConfig

    def torchao(config: str) -> Any:
        from torchao import quantization  # type: ignore[import-not-found, unused-ignore]
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, config)())

    def bitsandbytes(**options: Any) -> Any:
        import bitsandbytes  # type: ignore[import-not-found, unused-ignore]  # noqa: F401

        return BitsAndBytesConfig(**options)

    def quanto(weights: str) -> Any:
        import optimum.quanto  # type: ignore[import-not-found, unused-ignore]  # noqa: F401

        return QuantoConfig(weights=weights)

    makers: dict[str, Callable[[], Any]] = {
        "bnb-8bit": lambda: bitsandbytes(load_in_8bit=True),
        "bnb-4bit": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao-fp8": lambda: torchao("Float8WeightOnlyConfig"),
        "quanto-int8": lambda: quanto("int8"),
        "quanto-int4": lambda: quanto("int4"),
    }
    with quiet_transformers(bars=False):
        try:
            return makers[name]()
        except ImportError as error:
            raise ImportError(
                f"quantize: {name} needs {PACKAGES[name]}, which cannot be imported ({error}); "
                f"pip install {PACKAGES[name]}"
            ) from error
