"""Where each family keeps its layers, its attention and its MLP: read from transformers' modeling files by hand.

Nothing here comes from the package's own table, which this one is there to test. A site that a family does not have is
None; the comment says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Anatomy:
    """Module paths of one family; all but `layers` are relative to a layer.

    Args:
        layers: path of the list of decoder layers.
        attention: the module whose heads are counted; calls of the attention function by other modules are not heads.
        projection: the module that mixes the heads; its output is the site attn_out.
        mlp: the modules whose outputs add up to the site mlp_out.
        time: the axis of the tokens in what a layer returns.
        own_heads: how the heads are reached in a family that does not call transformers' attention function:
            "value": rows of the value projection, "fused": value rows of a fused one, "columns": the projection's
            input columns; "" where the attention function is called.
        value: the value projection, or the fused one, for `own_heads`.
        fused: order of the axes of the fused projection's output: "hqd" heads outermost, "qhd" q, k and v outermost.
    """

    layers: str | None = "model.layers"
    attention: str = "self_attn"
    projection: str | None = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp",)
    residual: bool = True
    time: int = 1
    own_heads: str = ""
    value: str = ""
    fused: str = ""


_LLAMA = Anatomy()
_BART = Anatomy("model.decoder.layers", "self_attn", "self_attn.out_proj", ("fc2",))
_GPT = Anatomy("transformer.h", "attn", "attn.c_proj")
_TOWER = replace(_LLAMA, layers="model.language_model.layers")
_MOE_AND_SHARED = replace(_LLAMA, mlp=("block_sparse_moe", "shared_mlp"))


def _bert(prefix: str, **changes: object) -> Anatomy:
    return replace(
        Anatomy(f"{prefix}.encoder.layer", "attention.self", "attention.output.dense", ("output.dense",)),
        **changes,  # type: ignore[arg-type]
    )


_OWN_BERT = {"own_heads": "value", "value": "attention.self.value"}

ANATOMIES: dict[str, Anatomy] = {
    "bamba": replace(_LLAMA, mlp=("feed_forward",)),
    "bart": _BART,
    "bert": _bert("bert"),
    "bert-generation": _bert("bert"),
    "big_bird": _bert("bert", **_OWN_BERT),
    "bigbird_pegasus": _BART,
    "biogpt": replace(_BART, layers="biogpt.layers"),
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    # The MLPs of BLOOM and MPT return their sum with the residual stream.
    "bloom": Anatomy(
        "transformer.h", "self_attention", "self_attention.dense", ("mlp.dense_4h_to_h",),
        own_heads="fused", value="self_attention.query_key_value", fused="hqd",
    ),
    # Bytes, patches and bytes again: four stacks of layers, none of which is the model's.
    "blt": Anatomy(None, projection=None, mlp=(), residual=False),
    "camembert": _bert("roberta"),
    "codegen": replace(_GPT, projection="attn.out_proj"),
    "cpmant": Anatomy(
        "cpmant.encoder.layers", "self_att.self_attention", "self_att.self_attention.attention_out", ("ffn.ffn",),
        own_heads="value", value="self_att.self_attention.project_v",
    ),
    "ctrl": Anatomy("transformer.h", "multi_head_attention", "multi_head_attention.dense", ("ffn",)),
    "data2vec-text": _bert("data2vec_text"),
    "dbrx": Anatomy("transformer.blocks", "norm_attn_norm.attn", "norm_attn_norm.attn.out_proj", ("ffn",)),
    "deepseek_v4": replace(_LLAMA, projection="self_attn.o_b_proj"),
    "electra": _bert("electra"),
    "ernie": _bert("ernie"),
    # One key and value for all query heads: only the projection's columns tell the heads apart.
    "falcon": Anatomy(
        "transformer.h", "self_attention", "self_attention.dense", ("mlp",), own_heads="columns",
    ),
    "falcon_h1": replace(_LLAMA, mlp=("feed_forward",)),
    "falcon_mamba": Anatomy("backbone.layers", projection=None, mlp=()),
    "fuyu": replace(_TOWER, projection="self_attn.dense"),
    "gemma3": _TOWER,
    "gemma3n_text": replace(_LLAMA, time=2),  # four streams, [4, B, T, d]
    "gemma4": _TOWER,
    "gemma4_unified": _TOWER,
    "git": _bert("git", **_OWN_BERT),
    "got_ocr2": _TOWER,
    "gpt-sw3": _GPT,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": Anatomy(
        "transformer.h", "attn.attention", "attn.attention.out_proj", own_heads="value", value="attn.attention.v_proj",
    ),
    "gpt_neox": Anatomy("gpt_neox.layers", "attention", "attention.dense"),
    "gpt_neox_japanese": Anatomy(
        "gpt_neox_japanese.layers", "attention", "attention.dense",
        own_heads="fused", value="attention.query_key_value", fused="hqd",
    ),
    "gptj": replace(_GPT, projection="attn.out_proj"),
    "granitemoe": replace(_LLAMA, mlp=("block_sparse_moe",)),
    "granitemoe_swa": _MOE_AND_SHARED,
    "granitemoehybrid": _MOE_AND_SHARED,
    "granitemoeshared": _MOE_AND_SHARED,
    # Two stacks that take turns several times a pass: there is no one list of layers.
    "hrm_text": Anatomy(None, projection=None, mlp=(), residual=False),
    "idefics3": replace(_LLAMA, layers="model.text_model.layers"),
    "inkling2_loop_text": replace(_LLAMA, projection="self_attn.o_proj.linear"),  # behind an elementwise gate
    "inkling2_text": replace(_LLAMA, projection="self_attn.o_proj.linear"),
    "jamba": replace(_LLAMA, mlp=("feed_forward",)),
    # A mixture of attention experts: each token's heads go through the output projections of the experts it chose.
    "jetmoe": Anatomy("model.layers", "self_attention", None),
    "lfm2": replace(_LLAMA, projection="self_attn.out_proj", mlp=("feed_forward",)),
    "lfm2_moe": replace(_LLAMA, projection="self_attn.out_proj", mlp=("feed_forward",)),
    "lfm3": replace(_LLAMA, mlp=("feed_forward",)),
    "llama4": replace(_LLAMA, mlp=("feed_forward",)),
    "llama4_text": replace(_LLAMA, mlp=("feed_forward",)),
    # Two attentions, two MLPs and a mixture of experts in each layer: which one is meant cannot be said.
    "longcat_flash": Anatomy("model.layers", "", None, ()),
    "mamba": Anatomy("backbone.layers", projection=None, mlp=()),
    "mamba2": Anatomy("backbone.layers", projection=None, mlp=()),
    "marian": _BART,
    "mbart": _BART,
    "megatron-bert": _bert("bert", **_OWN_BERT),
    "modernbert-decoder": Anatomy("model.layers", "attn", "attn.Wo"),
    "moshi": replace(_LLAMA, projection="self_attn.o_proj.linear"),
    "moss_transcribe_diarize": _TOWER,
    "mpt": Anatomy(
        "transformer.blocks", "attn", "attn.out_proj", ("ffn.down_proj",),
        own_heads="fused", value="attn.Wqkv", fused="qhd",
    ),
    "musicgen": _BART,
    "musicgen_melody": _BART,
    "mvp": replace(_BART, own_heads="value", value="self_attn.v_proj"),
    # A layer is one of: attention, a state space, an MLP, experts; all go by the name "mixer".
    "nemotron_h": Anatomy("model.layers", "mixer", "mixer.o_proj", ()),
    "openai-gpt": replace(_GPT, own_heads="fused", value="attn.c_attn", fused="qhd"),
    "opt": _BART,
    "pegasus": _BART,
    "persimmon": replace(_LLAMA, projection="self_attn.dense"),
    "phi": replace(_LLAMA, projection="self_attn.dense"),
    "plbart": _BART,
    "prophetnet": Anatomy(
        "prophetnet.decoder.layers", "self_attn", "self_attn.out_proj", ("feed_forward",),
        own_heads="value", value="self_attn.value_proj",
    ),
    "recurrent_gemma": Anatomy("model.layers", "temporal_block", "temporal_block.o_proj", ("mlp_block",)),
    # Reversible layers return a pair of streams and compute their own backward pass.
    "reformer": Anatomy(
        "reformer.encoder.layers", "attention.self_attention", "attention.output.dense", ("feed_forward",),
        residual=False, own_heads="columns",
    ),
    "rembert": _bert("rembert", **_OWN_BERT),
    "roberta": _bert("roberta"),
    "roberta-prelayernorm": _bert("roberta_prelayernorm"),
    "roc_bert": _bert("roc_bert"),
    "roformer": _bert("roformer", **_OWN_BERT),
    "rwkv": Anatomy("rwkv.blocks", projection=None, mlp=("feed_forward",)),
    "smolvlm": replace(_LLAMA, layers="model.text_model.layers"),
    "trocr": replace(_BART, own_heads="value", value="self_attn.v_proj"),
    "whisper": _BART,
    "xglm": Anatomy(
        "model.layers", "self_attn", "self_attn.out_proj", ("fc2",), own_heads="value", value="self_attn.v_proj",
    ),
    # Four lists side by side, of attentions, norms, MLPs and norms.
    "xlm": Anatomy(None, projection=None, mlp=(), residual=False),
    "xlm-roberta": _bert("roberta"),
    "xlm-roberta-xl": _bert("roberta"),
    # Tokens before rows, and an output projection that is a parameter of the attention, not a module.
    "xlnet": Anatomy("transformer.layer", "rel_attn", None, ("ff",), residual=False, time=0),
    "xlstm": Anatomy("backbone.blocks", projection=None, mlp=("ffn",)),
    "xmod": _bert("roberta"),
    # One block of attention and MLP, which several layers share.
    "zamba": Anatomy(
        "model.layers", "shared_transf.self_attn", "shared_transf.self_attn.o_proj", ("shared_transf.feed_forward",),
    ),
    "zamba2": Anatomy(
        "model.layers", "shared_transformer.self_attn", "shared_transformer.self_attn.o_proj",
        ("shared_transformer.feed_forward",),
    ),
}  # fmt: skip

#: Text towers of vision-language models, each built as Llama is.
_TOWERS = {"aya_vision", "internvl", "llava", "llava_next", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl"}
_TOWERS |= {"qwen3_vl", "qwen3_vl_moe"}


def anatomy_of(model_type: str) -> Anatomy:
    """The anatomy of a model type; what is not listed is built as Llama is."""
    return ANATOMIES.get(model_type, _TOWER if model_type in _TOWERS else _LLAMA)
