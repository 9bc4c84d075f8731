"""The table of model families: where each keeps its layers, the attention's output projection and the MLP's output.

There is one row per `model_type` of the config. `layers` is the path in the causal language model; the base model alone
lacks its first step. `projection` is the module whose input is the head site and whose output is the site attn_out;
`mlp` is the module whose output is the site mlp_out. Both paths start at a layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The paths of one family; an empty `mlp` means that the site mlp_out is not known."""

    layers: str
    projection: str
    mlp: str


_LLAMA = Family("model.layers", "self_attn.o_proj", "mlp")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": Family("model.layers", "self_attn.dense", "mlp"),
    "phi3": _LLAMA,
    "gpt2": Family("transformer.h", "attn.c_proj", "mlp"),
    "gptj": Family("transformer.h", "attn.out_proj", "mlp"),
    "gpt_neo": Family("transformer.h", "attn.attention.out_proj", "mlp"),
    "gpt_neox": Family("gpt_neox.layers", "attention.dense", "mlp"),
    # The feed-forward block of OPT is not a module of its own: fc2 stands in the layer.
    "opt": Family("model.decoder.layers", "self_attn.out_proj", "fc2"),
    # The MLPs of BLOOM and MPT return the sum with the residual stream; the addend is their last projection's output.
    "bloom": Family("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon": Family("transformer.h", "self_attention.dense", "mlp"),
    "mpt": Family("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "granite": _LLAMA,
    "cohere": _LLAMA,
    "smollm3": _LLAMA,
}
