"""How much memory a fit will take, from a model's config alone."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .. import defaults
from .._checks import check_counts
from .._tables import Readable
from ..architectures.layout import layout
from ..architectures.location import SITES
from ..ops.losses.linear_softmax import CHUNK_BYTES
from .engine.reference_cache import REFERENCE_ROWS, REFERENCE_TOKENS
from .engine.token_budget import PEAK_OVER_KEPT, SHARE_OF_FREE
from .execution import CACHE_BYTES
from .memory_simulation import frozen_pass, model_without_weights, step_pass

#: Adam's two moments, the parameters and their gradient, in float32.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device, for steps with or without recomputation."""

    recompute: bool
    weights: int
    #: What is kept of each example from step to step.
    references: int
    #: What a pass keeps for its backward pass.
    kept: int
    #: What a pass holds beyond that for a short while, or the pass of the frozen model if that takes more.
    transient: int
    #: The intervention's parameters, their gradients and Adam's moments.
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.references + self.kept + self.transient + self.optimizer


@dataclass(repr=False)
class MemoryPlan(Readable):
    """The memory of a fit on each device, as `plan_memory` predicts it."""

    model: str
    tokens: int
    prompts_per_pass: int
    dtype: str
    tp: int
    fsdp: int
    uses: list[MemoryUse] = field(default_factory=list)
    #: What to set.
    advice: list[str] = field(default_factory=list)

    def use(self, recompute: bool) -> MemoryUse:
        """The prediction with or without recomputation."""
        return next(use for use in self.uses if use.recompute is recompute)

    def to_dict(self) -> dict[str, Any]:
        """All figures in bytes, for JSON."""
        uses = [asdict(use) | {"total": use.total} for use in self.uses]
        return asdict(self) | {"uses": uses}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column names, rows) as text, in GB (10^9 bytes)."""
        names = ("weights", "references", "kept", "transient", "optimizer", "total")
        rows = [[name, *(f"{getattr(use, name) / 1e9:.3f}" for use in self.uses)] for name in names]
        return ["GB per device", *("recomputed" if use.recompute else "plain" for use in self.uses)], rows

    def _heading(self) -> str:
        sharded = "".join(f", {name} {n}" for name, n in (("tp", self.tp), ("fsdp", self.fsdp)) if n > 1)
        prompts = "1 prompt" if self.prompts_per_pass == 1 else f"{self.prompts_per_pass} prompts"
        return f"{self.model}, {self.dtype}{sharded}: {prompts} of {self.tokens} tokens in a pass, both directions"

    def _notes(self) -> list[str]:
        return self.advice


def plan_memory(
    model: str | os.PathLike[str] | Any,
    tokens: int,
    *,
    batch_size: int = defaults.BATCH_SIZE,
    accumulate: int | None = None,
    n_examples: int = 192,
    dtype: torch.dtype | str = "auto",
    site: str = "head",
    layers: Sequence[int] | None = None,
    tp: int = 1,
    fsdp: int = 1,
    memory_gb: float | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> MemoryPlan:
    """Predict the memory of a fit with scalars from a model's config; no weights are read or made.

    The passes of a step run on tensors without values, with an attention that keeps what a fused kernel keeps. Every
    prompt has the given length, and every token is steered. What other programs, the CUDA context and the allocator's
    fragments take comes on top.

    Args:
        model: a folder with a `config.json`, a name on the Hugging Face hub, or a config of transformers.
        tokens: the length of the prompts.
        batch_size: prompts in a step.
        accumulate: passes that a step is split into; None: one for each prompt, which takes the least memory.
        n_examples: number of examples.
        dtype: of the weights and activations; "auto": as the config says, or float32.
        site, layers: what is steered, as `ActivScalar.for_model` takes it.
        tp: number of processes that share each layer by tensor parallelism.
        fsdp: number of processes over which FSDP2 shards the weights; each runs prompts of its own.
        memory_gb: memory of one device, in GB (10^9 bytes), for the advice; None: it names no limit.
        cache_bytes: as for `fit`.

    Returns:
        MemoryPlan, which prints as a table; `.use(recompute=True).total` is in bytes.

    Raises:
        ValueError: a model that cannot run without values, sizes that `tp` does not divide, or bad counts.

    Example:
        >>> print(af.plan_memory("meta-llama/Llama-3.1-8B", tokens=4096, memory_gb=80))
    """
    check_counts(tokens=tokens, batch_size=batch_size, n_examples=n_examples, tp=tp, fsdp=fsdp)
    if accumulate is not None:
        check_counts(accumulate=accumulate)
    if memory_gb is not None and not memory_gb > 0:
        raise ValueError(f"memory_gb: got {memory_gb!r}, expected a number above 0")
    if site not in SITES:
        raise ValueError(f"site: got {site!r}, expected one of {', '.join(SITES)}")
    config = _config(model)
    type_ = _dtype(dtype, config)
    prompts = -(-min(batch_size, n_examples) // min(accumulate or batch_size, batch_size))
    whole = model_without_weights(config, type_)
    own = whole if tp == 1 else model_without_weights(_part(config, tp), type_)
    weights = _weights(whole, own, tp, fsdp)
    found = layout(own)
    text = config.get_text_config()
    place = layout(whole).location(site, found.layers_of(site) if layers is None else layers)
    first = place.first_changed(min(place.layers))
    n_bytes, width, vocabulary = type_.itemsize, text.hidden_size, -(-text.vocab_size // tp)
    head_is_read = fsdp == 1  # with tensor parallelism, by each process for its part of the vocabulary
    logits = vocabulary * n_bytes if not head_is_read or getattr(text, "final_logit_softcapping", None) else 0
    stored = (tokens * width * n_bytes if first else 0) + logits
    references = min(n_examples * stored, cache_bytes) + n_examples * (4 * width + 32) * head_is_read
    n_rows = 2 * prompts
    loss = min(n_rows * vocabulary * 4, CHUNK_BYTES) + (0 if head_is_read else 2 * n_rows * vocabulary * n_bytes)
    rows = min(max(REFERENCE_TOKENS // tokens, 1), REFERENCE_ROWS, n_examples)
    frozen = frozen_pass(own, rows, tokens)
    n_parameters = sum(place.sizes_of(index)[0] for index in range(len(place.layers)))
    uses = []
    for recompute in (False, True):
        step = step_pass(own, site, place.layers, n_rows, tokens, recompute=recompute)
        peak = max(step.peak, step.kept + loss, frozen)
        kept = min(step.kept, peak)
        uses.append(MemoryUse(recompute, weights, references, kept, peak - kept, n_parameters * _BYTES_PER_PARAMETER))
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else type(config).__name__
    plan = MemoryPlan(name, tokens, prompts, str(type_).removeprefix("torch."), tp, fsdp, uses)
    plan.advice = _advice(plan, memory_gb)
    return plan


def _free_for(plan: MemoryPlan, use: MemoryUse) -> float:
    """Bytes of a device on which `fit` runs a prompt so by itself: a pass may take a share of what is free."""
    return use.weights + use.references + PEAK_OVER_KEPT * use.kept / plan.prompts_per_pass / SHARE_OF_FREE


def _advice(plan: MemoryPlan, memory_gb: float | None) -> list[str]:
    plain, again = plan.use(False), plan.use(True)
    if memory_gb is None:
        return [
            f"What to set: nothing on devices of {max(_free_for(plan, plain), plain.total) / 1e9:.3g} GB or more. On "
            f"smaller ones 'auto' sets recompute=True, which fits from {again.total / 1e9:.3g} GB; memory_bytes= keeps "
            f"layers plain from {plain.total / 1e9:.3g} GB."
        ]
    limit = memory_gb * 1e9
    if max(_free_for(plan, plain), plain.total) <= limit:
        return [f"What to set: nothing, it fits in {memory_gb:g} GB without recomputation."]
    if plain.total <= limit:
        bound = math.ceil(PEAK_OVER_KEPT * plain.kept / plan.prompts_per_pass)
        return [
            f"What to set: nothing; 'auto' sets recompute=True, because a pass may take {SHARE_OF_FREE:.0%} of what is "
            f"free. memory_bytes={bound} keeps layers plain, which fits in {memory_gb:g} GB too."
        ]
    if again.total <= limit:
        return [f"What to set: recompute=True, which 'auto' chooses by itself; it then fits in {memory_gb:g} GB."]
    options = []
    if again.weights > limit / 2:
        options.append("divide the weights between more processes (tp, fsdp) or quantise them")
    if plan.prompts_per_pass > 1:
        options.append(f"run fewer prompts in a pass (accumulate: more than now, {plan.prompts_per_pass} in a pass)")
    if again.total - again.weights > limit / 4:
        options.append("steer upper layers only (layers), or shorten the prompts")
    return [
        f"What to set: it does not fit in {memory_gb:g} GB even with recompute=True; "
        f"{'; or '.join(options or ['use a larger device'])}."
    ]


def _config(model: Any) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model: got {type(model).__name__}, expected a folder, a name on the hub or a config")
    return AutoConfig.from_pretrained(os.fspath(model))


def _dtype(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: got {dtype!r}, expected 'auto', float32, bfloat16 or float16")
    return found


def _part(config: Any, tp: int) -> Any:
    """The config of one process's part of each layer, as transformers' plans for tensor parallelism divide it."""
    part = copy.deepcopy(config)
    text = part.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(f"tp: transformers has no plan for {type(config).__name__}, expected tp=1")
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        size = getattr(text, name, None)
        if size is None:
            continue
        if size % tp:
            raise ValueError(f"tp: got {tp}, which does not divide {name}={size}")
        setattr(text, name, size // tp)
    return part


def _weights(whole: nn.Module, own: nn.Module, tp: int, fsdp: int) -> int:
    """Bytes of weights on one device; with FSDP2, two gathered layers and what is outside the layers come on top."""
    layers = [_bytes(layer) for layer in layout(own).layers]
    outside = _bytes(own) - sum(layers)
    plan = getattr(whole, "_tp_plan", None) or {}
    head: Any = whole.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and head.weight is whole.get_input_embeddings().weight  # type: ignore[operator]
    if tp > 1 and head is not None and not tied and any("lm_head" in name for name in plan):
        outside -= _bytes(head) - _bytes(head) // tp
    held = outside + sum(layers)
    if fsdp == 1:
        return held
    return -(-held // fsdp) + outside + sum(sorted(layers)[-2:])


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
