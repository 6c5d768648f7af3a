"""The one table of tiny models: a family's name, and the special settings of its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as tf

VOCAB, WIDTH, HEADS, LAYERS, INNER, LABELS = 64, 16, 2, 2, 24, 3

# the names of each size in configurations, of which a configuration is given those that it has
_NAMES = {
    "vocab": "vocab_size vocab_size_per_layer_input",
    "width": "hidden_size n_embd d_model dim word_embed_proj_dim embedding_size lru_width"
    " input_embedding_size output_embedding_size",
    "inner": "intermediate_size ffn_dim d_ff dff d_inner hidden_dim encoder_ffn_dim decoder_ffn_dim"
    " moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp",
    "layers": "num_hidden_layers n_layer n_layers num_layers num_decoder_layers"
    " encoder_layers decoder_layers",
    "heads": "num_attention_heads n_head n_heads num_heads attention_heads"
    " encoder_attention_heads decoder_attention_heads",
    "kv": "num_key_value_heads num_kv_heads",
    "length": "max_position_embeddings n_positions max_seq_len max_target_positions"
    " max_encoder_position_embeddings max_decoder_position_embeddings",
    "std": "initializer_range init_std",
}
_OTHERS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"decoder_start_token_id": 2, "forced_eos_token_id": None}

_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_WINDOW = {"sliding_window": 8}
_START = {"decoder_start_token_id": 0}
_DECODES = {"is_decoder": True, "tie_word_embeddings": False}
_UNTIED = {"tie_word_embeddings": False}
# layers that share another's keys and values, and layers of two sizes
SHARED = {
    "num_hidden_layers": 6,
    "layer_types": _BOTH["layer_types"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    **_WINDOW,
    **_UNTIED,
}
_SEAMLESS = {
    "speech_encoder_layers": 1,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "decoder_start_token_id": 3,
}
_MODERN = {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {}),
    "mistral": ("Mistral", _WINDOW),
    # with tied embeddings, random models of gemma repeat their last token
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {**_WINDOW, "attn_logit_softcapping": 5.0, **_UNTIED}),
    "gemma3": ("Gemma3Text", {**_WINDOW, **_BOTH, **_UNTIED}),
    "gemma3n": (
        "Gemma3nText",
        {
            **SHARED,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    "gemma4": (
        "Gemma4Text",
        {**SHARED, "global_head_dim": 16, "num_experts": None, "moe_intermediate_size": None},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {}),
    "qwen2_5_vl_text": ("Qwen2_5_VLText", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {}),
    "mixtral": ("Mixtral", {"sliding_window": None}),
    "llama4": ("Llama4Text", {"attention_chunk_size": 32}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox_japanese": ("GPTNeoXJapanese", {}),
    "gpt_oss": ("GptOss", {**_WINDOW, **_BOTH}),
    "bloom": ("Bloom", {}),
    "gptj": ("GPTJ", {}),
    "codegen": ("CodeGen", {"pad_token_id": 0}),
    "gpt_neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_bigcode": ("GPTBigCode", {}),
    "falcon": ("Falcon", {"new_decoder_architecture": True}),
    "falcon_mqa": ("Falcon", {"multi_query": True}),
    "falcon_alibi": ("Falcon", {"multi_query": False, "alibi": True, "num_kv_heads": None}),
    "mpt": ("Mpt", {}),
    "stablelm": ("StableLm", {}),
    "cohere": ("Cohere", {"logit_scale": 1.0}),
    "cohere2": ("Cohere2", {"logit_scale": 1.0, **_WINDOW, **_BOTH}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {}),
    "starcoder2": ("Starcoder2", _WINDOW),
    "smollm3": ("SmolLM3", {}),
    "nemotron": ("Nemotron", {}),
    "xglm": ("XGLM", {}),
    "doge": ("Doge", {"keep_window_size": 8}),
    "doge window": ("Doge", {"sliding_window": 7}),
    "diffllama": ("DiffLlama", {}),
    "ctrl": ("CTRL", _UNTIED),
    "jetmoe": ("JetMoe", {}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "attention_window_size": 32,
            "block_types": ["recurrent", "attention"],
            "num_key_value_heads": 1,
            **_UNTIED,
        },
    ),
    "modernbert-decoder": ("ModernBertDecoder", {**_MODERN, **_BOTH}),
    "bert-generation": ("BertGeneration", _DECODES),
    "megatron-bert decoder": ("MegatronBert", _DECODES),
    "rembert decoder": ("RemBert", _DECODES),
    "roformer decoder": ("RoFormer", _DECODES),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "electra": ("Electra", {}),
    "distilbert": ("DistilBert", {}),
    "modernbert": ("ModernBert", {**_MODERN, "layer_types": _BOTH["layer_types"][::-1]}),
    "layoutlm": ("LayoutLM", {}),
    "xlm-roberta": ("XLMRoberta", {}),
    "xlm-roberta-xl": ("XLMRobertaXL", {}),
    "ernie": ("Ernie", {}),
    "rembert": ("RemBert", {}),
    "megatron-bert": ("MegatronBert", {}),
    "roc_bert": ("RoCBert", {}),
    "data2vec-text": ("Data2VecText", {}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {}),
    "xmod": ("Xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
    "camembert": ("Camembert", {}),
    "eurobert": ("EuroBert", {"mask_token_id": 3}),
    "roformer": ("RoFormer", {}),
    "big_bird": ("BigBird", {"attention_type": "original_full", "use_bias": True}),
    "deberta": ("Deberta", {}),
    "deberta-v2": ("DebertaV2", {}),
    "albert": ("Albert", {}),
    "xlnet": ("XLNet", {}),
    "fnet": ("FNet", {}),
    "vit": ("ViT", {}),
    "clip vision": ("CLIPVision", {}),
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _START),
    "mt5": ("MT5", _START),
    "umt5": ("UMT5", _START),
    "longt5": ("LongT5", {**_START, "local_radius": 4}),
    "switch_transformers": ("SwitchTransformers", _START),
    "bart": ("Bart", _BART),
    "mbart": ("MBart", _BART),
    "marian": ("Marian", _BART),
    "pegasus": ("Pegasus", _BART),
    "pegasus_x": ("PegasusX", _BART),
    "blenderbot": ("Blenderbot", _BART),
    "blenderbot-small": ("BlenderbotSmall", _BART),
    "m2m_100": ("M2M100", _BART),
    "plbart": ("PLBart", _BART),
    "nllb-moe": ("NllbMoe", _BART),
    "mvp": ("Mvp", _BART),
    "led": ("LED", {**_BART, "attention_window": [4, 4]}),
    "bigbird_pegasus": ("BigBirdPegasus", {**_BART, "attention_type": "original_full"}),
    "seamless_m4t": ("SeamlessM4T", _SEAMLESS),
    "seamless_m4t_v2": ("SeamlessM4Tv2", _SEAMLESS),
    "whisper": (
        "Whisper",
        {
            **_BART,
            "max_source_positions": 20,
            "num_mel_bins": 8,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
    ),
}
FAMILIES = {**DECODERS, **ENCODERS, **SEQ2SEQ}


def config(family: str, **sizes_and_own: Any) -> Any:
    """The configuration of a family of :data:`FAMILIES`, as :func:`config_of` makes it."""
    name, settings = FAMILIES[family]
    return config_of(name, **{**settings, **sizes_and_own})


def config_of(
    name: str,
    *,
    width: int = WIDTH,
    heads: int = HEADS,
    kv: int = 1,
    layers: int = LAYERS,
    inner: int = INNER,
    vocab: int = VOCAB,
    length: int = 64,
    std: float = 0.2,
    **own: Any,
) -> Any:
    """A configuration without dropout, of these sizes, whatever their names are there.

    ``name`` is the start of its class's name, "Llama" for LlamaConfig. ``own`` are further
    settings, by their names in the configuration. ``std`` is so large that every layer has an
    effect on the output.
    """
    cls = getattr(tf, f"{name}Config")
    has = inspect.signature(cls).parameters
    sizes = dict(width=width, heads=heads, kv=kv, layers=layers, inner=inner, vocab=vocab)
    sizes |= dict(length=length, std=std)
    found = {called: sizes[what] for what, names in _NAMES.items() for called in names.split()}
    found |= dict.fromkeys(("head_dim", "d_kv", "kv_channels"), width // heads)
    drops = {n: 0.0 for n, p in has.items() if "drop" in n and not isinstance(p.default, bool)}
    found |= {**_OTHERS, **_TOKENS, **drops}
    found = {called: value for called, value in found.items() if called in has}
    return cls(**{**found, "num_labels": LABELS, **own})


CLASSES = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": tf.AutoModel,
    None: tf.AutoModel,
}


def task_of(family: str) -> str:
    if family in DECODERS:
        return "CAUSAL_LM"
    return "SEQ_CLS" if family in ENCODERS else "SEQ_2_SEQ_LM"


def build(
    family: str,
    task: str | None = "",
    draw: float = 0.0,
    implementation: str | None = None,
    **own: Any,
) -> Any:
    """A model of :func:`config` in evaluation mode, the same one for the same arguments.

    Without a ``task`` it is for that of its family. Biases are drawn, as zeros would hide one that
    is left out or added twice. With ``draw`` all weights but norms and positions are drawn too,
    also those that a class draws smaller than its configuration asks for, or does not draw.
    """
    torch.manual_seed(0)
    if task == "QUESTION_ANS":  # one label for the start and one for the end
        own["num_labels"] = 2
    task = task_of(family) if task == "" else task
    cls = tf.AutoModelForSpeechSeq2Seq if family == "whisper" else CLASSES[task]
    model = cls.from_config(config(family, **own), attn_implementation=implementation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
            elif draw and (weight.dim() > 1 or name.endswith(("sinks", ".A"))):
                if "position" not in name:
                    weight.normal_(std=draw)
    return model.eval()
