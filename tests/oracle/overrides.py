"""What the general shrinking of `tiny` does not know: families whose sizes depend on each other in their own way."""

from __future__ import annotations

from typing import Any

_HYBRID = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
#: transformers sizes the cache of a decoder taken alone by the encoder's layers: no fewer than the decoder's.
_BART: dict[str, Any] = {"encoder_layers": 5, "is_encoder_decoder": False}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA4: dict[str, Any] = {
    "layer_types": _SLIDING,
    "per_layer_config": {1: {"head_dim": 24}, 3: {"head_dim": 24}},
    "hidden_size_per_layer_input": 8,
}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2, "hc_count": 2, "hc_lowrank": 8,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
    "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip

#: model_type -> arguments of its config; a nested dict changes a nested config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bart": _BART,
    "bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": None, "sliding_attention": _ROPE},
        "layer_types": _SLIDING,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "model_type": "", "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "topk_method": "greedy"},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": None, "n_output_layers": 1, "layer_types": _SLIDING},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "blt": {
        "use_cache": False, "encoder_hash_byte_group_vocab": 50, "patch_size": 4, "vocab_size": 260,
        "encoder_config": {"vocab_size": 260, "head_dim": 8, "hidden_size_global": 32},
        "decoder_config": {"vocab_size": 260, "head_dim": 8, "hidden_size_global": 32},
        "global_config": {"head_dim": 8}, "patcher_config": {"vocab_size": 260, "head_dim": 8},
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 12, "swa_v_head_dim": 24,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 4, "patch_size": 4,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "gemma3n_text": {
        "layer_types": _SLIDING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    },
    "gemma4_text": {**_GEMMA4, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {**_GEMMA4, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "marian": _BART,
    "mbart": _BART,
    "ministral": {"head_dim": 16},
    "mvp": _BART,
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "pegasus": _BART,
    "plbart": _BART,
    "prophetnet": {"num_encoder_layers": 5, "is_encoder_decoder": False},
    "qwen2_5_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4, "hash_seed": 0,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlnet": {"d_head": 8, "attn_type": "uni"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_mem_blocks": 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "xlm": {"causal": True},
}  # fmt: skip
#: The config that the model's class takes, where it is a part of the model type's.
PARTS: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}
#: Architectures that cannot run by themselves, and why.
CANNOT_RUN: dict[str, str] = {
    "gemma3n": "its vision tower needs the library timm; gemma3n_text is the same decoder",
    "gemma4_assistant": "a drafter: it reads the keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "a drafter: it reads the keys and values of the model that it drafts for",
}
#: Classes outside the causal mapping that are used as causal language models all the same.
MORE: dict[str, str] = {
    "aya_vision": "AyaVisionForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}
