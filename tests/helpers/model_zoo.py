"""Tiny random models of every supported family, made from configs alone: no download, a few milliseconds each."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from actscale_fast.interventions import ActivScalar, Intervention

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GQA, "head_dim": 10}  # heads · head_dim = 40, not the hidden size
MOE: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "mlp_only_layers": [],
}
GPT: dict[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
NO_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: model_type -> arguments of its config.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": WIDE,
    "mixtral": {**GQA, **MOE},
    "qwen2": GQA,
    "qwen3": WIDE,
    "qwen3_moe": {**WIDE, **MOE},
    "gemma": WIDE,
    "gemma2": {**WIDE, "query_pre_attn_scalar": 10, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**WIDE, "query_pre_attn_scalar": 10, "sliding_window": 8},
    "phi": COMMON,
    "phi3": GQA,
    "gpt2": {**GPT, **NO_SPECIAL},
    "gptj": {**GPT, **NO_SPECIAL},
    "gpt_neo": {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        **NO_SPECIAL,
    },
    "gpt_neox": COMMON,
    "opt": {**COMMON, "ffn_dim": 40, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, **NO_SPECIAL},
    "falcon": {**COMMON, "ffn_hidden_size": 40},
    "mpt": {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **NO_SPECIAL},
    "olmo": GQA,
    "olmo2": GQA,
    "stablelm": GQA,
    "starcoder2": GQA,
    "granite": {**GQA, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "cohere": GQA,
    "smollm3": GQA,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config of a two-layer model with four heads."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})


def tiny_model(model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model in eval mode whose parameters are large enough that every part matters to the logits."""
    return copy.deepcopy(_made(model_type, seed, dtype, tuple(sorted(changes.items()))))


@functools.cache
def _made(model_type: str, seed: int, dtype: torch.dtype, changes: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoModelForCausalLM

    if model_type == "mpt" and dtype == torch.float64 and transformers_before("5.2"):
        pytest.skip("MPT's attention mask overflows in float64 before transformers 5.2")
    config = tiny_config(model_type, **dict(changes))
    config._experts_implementation = "eager"  # the grouped matrix product has no float64
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            if parameter.dim() == 1:  # norms and biases: away from their initial 1 and 0
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name or "wte" in name else parameter.shape[-1] ** -0.5))
    return model.eval()


IDS = torch.tensor([[5, 9, 12, 7, 30, 2], [8, 8, 41, 3, 19, 60], [4, 6, 10, 11, 13, 14]])
PROMPT, OTHER = torch.tensor([[5, 9, 12, 7, 30]]), torch.tensor([[11, 8, 14]])  # of different lengths
SITES = ["head", "attn_out", "mlp_out", "residual"]


def randomised(intervention: Intervention, seed: int = 1, scale: float = 1.0) -> Intervention:
    """The intervention with normally distributed parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in intervention.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return intervention


def scalars(model: nn.Module, seed: int = 1, **kwargs: object) -> ActivScalar:
    """Random scalars for the model."""
    return randomised(ActivScalar.for_model(model, **kwargs), seed)  # type: ignore[return-value]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def checkpoint_activations(model: Any, reentrant: bool) -> None:
    """Activation checkpointing, which transformers 5 called gradient checkpointing at first."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def transformers_before(version: str) -> bool:
    """Whether an older transformers than this release is installed."""
    import transformers

    return Version(transformers.__version__) < Version(version)
