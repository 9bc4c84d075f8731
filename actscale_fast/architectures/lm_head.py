"""The output head of a causal language model: logits = softcap·tanh(scale·(W·h + b)/softcap)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import fsdp_mesh

#: How far the model's logits may differ from the formula, in roundings of the dtype at the largest logit.
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The head of a model whose logits are softcap·tanh(scale·(W·h + b)/softcap); without one scale·(W·h + b)."""

    module: nn.Module
    weight: Tensor  # [V, d], detached
    bias: Tensor | None  # [V], detached
    scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `ops.reference_statistics` and `ops.linear_intervention_loss`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V], in hidden's dtype."""
        z = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def chosen(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits of some tokens [K, J] from hidden [K, d] and ids int64 [K, J], in fp32 or wider."""
        weight, bias, wide = self.weight, self.bias, torch.promote_types(hidden.dtype, torch.float32)
        ids, hidden = ids.to(weight.device), hidden.to(weight.device)
        z = (weight[ids].to(wide) * hidden.to(wide)[:, None]).sum(-1)  # [K, J, d] · [K, 1, d]
        z = self.scale * (z if bias is None else z + bias[ids].to(wide))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@torch.no_grad()
def read_head(model: nn.Module, arguments: dict[str, Any]) -> OutputHead | None:
    """The head of `model`, checked in one forward pass; None where its logits follow another formula.

    Args:
        model: a Hugging Face causal language model, not wrapped.
        arguments: the arguments of a forward pass on a prompt or two.
    """
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    plain = (Tensor, nn.Parameter)
    if not isinstance(module, nn.Module) or type(weight) not in plain or type(bias) not in (*plain, type(None)):
        return None
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta or module._forward_hooks:
        return None
    if fsdp_mesh(model) is not None:  # a weight that is whole now is given up after a pass
        return None
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        found = model(**arguments).logits[:, -1]
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[-1] != weight.shape[1] or found.shape[-1] != weight.shape[0]:
        return None
    bias = None if bias is None else bias.detach()
    scale, softcap = _post_processing(getattr(model, "config", None))
    for candidate in dict.fromkeys([(scale, softcap), (1.0, softcap), (scale, None), (1.0, None)]):
        head = OutputHead(module, weight.detach(), bias, *candidate)
        expected = head.logits(seen[0][:, -1].to(weight.device)).to(found.device)
        size = expected.abs().amax().double()
        if bool((expected - found).abs().amax() <= _ROUNDINGS * torch.finfo(found.dtype).eps * size):
            return head
    return None


def _post_processing(config: Any) -> tuple[float, float | None]:
    """(factor, soft-cap) as the config names them; `read_head` checks what the model does with them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = float(scale) if isinstance(scale, int | float) else 1.0
    if isinstance(divisor, int | float) and divisor:
        factor /= float(divisor)
    return factor, float(softcap) if isinstance(softcap, int | float) and softcap else None
