"""What Triton would specialise a launch into, for compiling its kernels without a GPU and without its launcher."""

from __future__ import annotations

from typing import Any

NAMES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32"}


def source_of(kernel: Any, arguments: tuple[Any, ...], rest: dict[str, Any]) -> tuple[Any, dict[str, Any], list[Any]]:
    """Types, constants and what is divisible by 16, as an ASTSource; the options; the arguments that are left.

    Tensors on the meta device count as aligned.
    """
    import torch
    from triton.compiler import ASTSource

    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **rest}
    signature, constants, attributes, passed = {}, {}, {}, []
    for index, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        whole = isinstance(value, int) and not isinstance(value, bool) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (whole and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        passed.append(value)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[str(value.dtype).removeprefix("torch.")]
            aligned = value.data_ptr() % 16 == 0
        elif whole:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            assert isinstance(value, float), f"{parameter.name}: {value!r}"
            signature[parameter.name], aligned = "fp32", False
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), values, passed
