"""The output head of a causal language model: logits = softcap·tanh(scale·(W·h + b)/softcap).

Under tensor parallelism each process holds some rows of W. Then the methods of `OutputHead` are collective operations
on hidden states that are alike in all processes, and so are the backward passes of their results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.losses.linear_logits import chunks
from ..ops.losses.sharded_linear import sharded_intervention_loss, sharded_reference_statistics
from ..ops.losses.vocabulary_shard import VocabularyShard
from .sharding import fsdp_mesh, is_dtensor, local

#: How far the model's logits may differ from the formula, in roundings of the dtype at the largest logit.
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class OutputHead:
    """The head of a model whose logits are softcap·tanh(scale·(W·h + b)/softcap); without one scale·(W·h + b)."""

    module: nn.Module
    weight: Tensor  # [V, d], detached; the rows of this process
    bias: Tensor | None  # [V], detached; those of this process
    scale: float
    softcap: float | None
    shard: VocabularyShard | None = None  # the tokens of this process; None: all of them

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `ops.reference_statistics` and `ops.linear_intervention_loss`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V], in hidden's dtype."""
        if self.shard is None:
            return self._capped(nn.functional.linear(hidden, self.weight, self.bias))
        own = nn.functional.linear(self.shard.shared(hidden), self.weight, self.bias)
        return self._capped(self.shard.join(own))

    def chosen(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logits of some tokens [K, J] from hidden [K, d] and ids int64 [K, J], in fp32 or wider."""
        weight, bias, wide = self.weight, self.bias, torch.promote_types(hidden.dtype, torch.float32)
        ids, hidden = ids.to(weight.device), hidden.to(weight.device)
        if self.shard is not None:
            hidden = self.shard.shared(hidden)
            ids, inside = self.shard.own(ids)
            if not self.shard.count:  # an index into nothing
                return self._capped(self.shard.total(0.0 * hidden[:, :1].to(wide).expand(ids.shape)))
        z = (weight[ids].to(wide) * hidden.to(wide)[:, None]).sum(-1)  # [K, J, d] · [K, 1, d]
        z = z if bias is None else z + bias[ids].to(wide)
        if self.shard is not None:
            z = self.shard.total(torch.where(inside, z, 0.0))
        return self._capped(z)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of W of some tokens, [M, d] from int64 [M]."""
        ids = ids.to(self.weight.device)
        if self.shard is None:
            return self.weight[ids]
        ids, inside = self.shard.own(ids)
        own = self.weight.new_zeros(len(ids), self.weight.shape[1])
        own[inside] = self.weight[ids[inside]]
        return self.shard.sum_(own)

    def chunks(self, hidden: Tensor, chunk_bytes: int) -> Iterator[slice]:
        """Slices of rows whose logits, and what their losses make of them, fit into `chunk_bytes`."""
        if self.shard is None:
            return chunks(hidden, self.weight, self.softcap, chunk_bytes)
        return self.shard.slices(hidden, chunk_bytes // self.shard.size)  # whole logits

    def reference_statistics(
        self, hidden: Tensor, correct: Tensor, wrong: Tensor, **kl: Any
    ) -> ops.ReferenceStatistics:
        """`ops.reference_statistics` of this head."""
        if self.shard is None:
            return ops.reference_statistics(hidden, self.weight, correct, wrong, **kl, **self.options)
        return sharded_reference_statistics(hidden, self.weight, correct, wrong, self.shard, **kl, **self.options)

    def intervention_loss(
        self, hidden: Tensor, reference: ops.ReferenceStatistics, correct: Tensor, wrong: Tensor, **options: Any
    ) -> tuple[Tensor, ...]:
        """`ops.linear_intervention_loss` of this head."""
        if self.shard is None:
            return ops.linear_intervention_loss(
                hidden, self.weight, reference, correct, wrong, **options, **self.options
            )
        return sharded_intervention_loss(
            hidden, self.weight, reference, correct, wrong, self.shard, **options, **self.options
        )

    def _capped(self, products: Tensor) -> Tensor:
        z = self.scale * products
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
    shard = None
    if is_dtensor(weight):
        shard = _vocabulary_shard(weight, bias)
        if shard is None:
            return None
        weight, bias = local(weight), None if bias is None else local(bias)
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
    vocab = weight.shape[0] if shard is None else shard.vocab
    if len(seen) != 1 or seen[0].shape[-1] != weight.shape[1] or found.shape[-1] != vocab:
        return None
    bias = None if bias is None else bias.detach()
    scale, softcap = _post_processing(getattr(model, "config", None))
    for candidate in dict.fromkeys([(scale, softcap), (1.0, softcap), (scale, None), (1.0, None)]):
        head = OutputHead(module, weight.detach(), bias, *candidate, shard)
        expected = head.logits(seen[0][:, -1].to(weight.device)).to(found.device)
        size = expected.abs().amax().double()
        if bool((expected - found).abs().amax() <= _ROUNDINGS * torch.finfo(found.dtype).eps * size):
            return head
    return None


def _vocabulary_shard(weight: Any, bias: Any) -> VocabularyShard | None:
    """The rows of a head's weight in this process, if tensor parallelism divides it by rows and nothing else."""
    mesh = weight.device_mesh
    for value in (weight, bias):
        by_rows = (
            is_dtensor(value) and value.device_mesh == mesh and [p.is_shard(0) for p in value.placements] == [True]
        )
        if value is not None and not by_rows:
            return None
    shard = VocabularyShard(mesh.get_group(), mesh.get_local_rank(), mesh.size(), weight.shape[0])
    return shard if all(len(local(value)) == shard.count for value in (weight, bias) if value is not None) else None


def _post_processing(config: Any) -> tuple[float, float | None]:
    """(factor, soft-cap) as the config names them; `read_head` checks what the model does with them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = float(scale) if isinstance(scale, int | float) else 1.0
    if isinstance(divisor, int | float) and divisor:
        factor /= float(divisor)
    return factor, float(softcap) if isinstance(softcap, int | float) and softcap else None
