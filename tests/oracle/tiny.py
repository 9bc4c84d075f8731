"""A tiny random model of any config class, made from the class alone: nothing is downloaded.

The defaults of the class are shrunk attribute by attribute (`SIZES`), nested configs included, lists that have one item
per layer are left to the class or made anew, and the few families that need more are told so in `overrides`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from .overrides import OVERRIDES, PARTS

N_LAYERS = 4
#: Attribute of a config -> its tiny value. Heads times head_dim (64) differs from the hidden size (32) where a family
#: lets it, value heads of MLA are wider than the others, and there are fewer key-value heads than query heads.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "input_embedding_size"], 32),
    **dict.fromkeys(["embedding_size", "output_embedding_size", "lru_width", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"], N_LAYERS),
    **dict.fromkeys(["decoder_layers", "num_blocks"], N_LAYERS),
    **dict.fromkeys(["encoder_layers", "num_encoder_layers", "depth"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "num_encoder_attention_heads"], 2),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"], 16),
    "global_head_dim": 24,
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"], 40),
    **dict.fromkeys(["n_inner", "d_inner", "dff", "dim_ff", "d_ff", "feed_forward_size", "mlp_dim"], 40),
    **dict.fromkeys(["intermediate_size_mlp", "dense_intermediate_size"], 40),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size"], 16),
    **dict.fromkeys(["shared_experts_intermediate_size", "router_hidden_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["moe_top_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["num_nextn_predict_layers"], 0),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "output_vocab_size"], 61),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"], 64),
    **dict.fromkeys(["max_source_positions", "model_max_length", "context_length"], 64),
    **dict.fromkeys(["original_max_position_embeddings"], 64),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "keep_window_size"], 6),
    **dict.fromkeys(["window_size", "attention_chunk_size", "local_attention"], 6),
    "rotary_dim": 4,
    # Latent attention.
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 20,
    "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 8, "index_head_dim": 8, "index_topk": 6,
    "index_topk_blocks": 2, "index_block_size": 4,
    # Linear attention, state spaces, convolutions.
    **dict.fromkeys(["linear_num_key_heads", "linear_num_heads"], 2),
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8,
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 8),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 4),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups"], 2),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "block_size"], 4),
    "mamba_d_ssm": 64,
    # Token ids.
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2,
    "cls_token_id": 1, "mask_token_id": 3, "eod_token_id": 2, "forced_eos_token_id": None,
    **dict.fromkeys(["image_token_id", "image_token_index"], 60),
    **dict.fromkeys(["audio_token_id", "video_token_id", "video_token_index"], 59),
    **dict.fromkeys(["boi_token_id", "boa_token_id", "boi_token_index", "vision_start_token_id"], 58),
    **dict.fromkeys(["eoi_token_id", "eoa_token_id", "eoi_token_index", "vision_end_token_id"], 57),
    "eoa_token_index": 57,
    # Pictures and sound.
    "image_size": 16, "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16, "num_mel_bins": 8,
    "projection_dim": 32, "vision_output_dim": 32,
    # What must not be random, and what decoders of the BERT kind need in order to be causal.
    "is_decoder": True,
    "use_cache": True,
    "use_mamba_kernels": False,
}  # fmt: skip
#: One item per layer: made by the class from the number of layers.
PER_LAYER = {"per_layer_config", "indexer_types", "no_rope_layers", "moe_layers", "layer_rope_theta", "full_attn_idxs"}
PER_LAYER |= {"num_attention_heads_per_layer", "activation_sparsity_pattern", "attention_layers", "attention_types"}
#: Names of layer kinds; repeated in turn over the tiny model's layers.
PER_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
#: Made by the class from others.
DERIVED = {"qk_head_dim", "id2label", "label2id", "architectures", "model_type", "transformers_version", "dtype"}


def config_class(model_type: str) -> Any:
    """The class of a model type's config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def tiny_config(model_type: str) -> Any:
    """A tiny config of the model type."""
    cls = config_class(model_type)
    return cls(**_arguments(cls, OVERRIDES.get(model_type, {})))


def _arguments(cls: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a config of this class tiny, `changes` before the general sizes."""
    default = cls()
    nested = dict(getattr(cls, "sub_configs", None) or {})
    arguments: dict[str, Any] = {}
    attributes = _attributes(default)
    latent = attributes.get("kv_lora_rank") is not None
    for name, value in attributes.items():
        if name in changes or name in DERIVED or name in PER_LAYER or name in nested:
            continue
        if name in PER_LAYER_KINDS and isinstance(value, list | tuple) and value:
            arguments[name] = _kinds(list(value))
        elif name in SIZES and (value is not None or name == "head_dim" or name.endswith("token_id")):
            arguments[name] = SIZES[name]
        elif "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
            arguments[name] = 0.0
    if "pad_token_id" not in changes:
        arguments["pad_token_id"] = 0  # older releases read it without declaring it
    if latent:
        arguments["head_dim"] = SIZES["qk_rope_head_dim"]  # what the rotary table is made for
        arguments["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, sub in nested.items():
        inner = changes.get(name, {})
        there = getattr(default, name, None)
        if inner is None or (there is None and name not in changes):
            continue
        sub_cls = type(there) if there is not None and hasattr(there, "to_dict") else sub
        if not hasattr(sub_cls, "to_dict") or sub_cls.__name__ == "AutoConfig":
            continue
        kind = getattr(sub_cls, "model_type", "")
        made = _arguments(sub_cls, {**OVERRIDES.get(kind, {}), **inner})
        arguments[name] = {**made, "model_type": kind}
    given = {key: value for key, value in changes.items() if key not in nested}
    return {**arguments, **given}


def _attributes(config: Any) -> dict[str, Any]:
    """What the class takes, under the names that it takes them by."""
    found = config.to_dict()
    for name, parameter in inspect.signature(type(config).__init__).parameters.items():
        if name in SIZES and name not in found:  # it differs between layers, or is kept under another name
            found[name] = parameter.default if parameter.default is not parameter.empty else 0
    return found


def _kinds(kinds: list[str]) -> list[str]:
    """The kinds in the order of their first appearance, in turn."""
    unlike = list(dict.fromkeys(kinds))
    return [unlike[index % len(unlike)] for index in range(N_LAYERS)]


def model_class(model_type: str, name: str) -> Any:
    """The class that the auto mapping names."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    if hasattr(module, name):
        return getattr(module, name)
    import transformers

    return getattr(transformers, name)


def tiny_model(model_type: str, name: str, *, seed: int = 0) -> Any:
    """A random float32 model in evaluation mode, as `AutoModelForCausalLM` makes it from its config.

    Args:
        model_type: the config's.
        name: of the model's class.
        seed: of the parameters.
    """
    config, cls = tiny_config(model_type), model_class(model_type, name)
    if model_type in PARTS:
        config = getattr(config, PARTS[model_type])
    text = (getattr(config, "sub_configs", None) or {}).get("text_config")
    if text is not None and getattr(cls, "config_class", None) == text and type(config) is not text:
        config = config.get_text_config()  # so does the auto class
    # The grouped product of experts has no float64.
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"}
    try:
        model = cls._from_config(config, **options)
    except ValueError:
        model = cls._from_config(config)
    model = model.float().eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Make every parameter large enough that its part matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:  # norms, biases, decays: near where the class put them
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "shared" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
