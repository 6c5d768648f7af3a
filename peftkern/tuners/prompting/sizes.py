"""Sizes of virtual tokens and prefixes, read from the model that they are for."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...configs.prefix_tuning import check_divides
from ...configs.prompt_learning import PromptLearningConfig
from ...utils.peft_types import PeftType, TaskType

# names under which transformers' configurations keep one size, in order of preference
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "attention_heads",
    "encoder_attention_heads",
)
_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")


def has_config(model: Any) -> bool:
    """True when the model has a configuration of transformers' kind."""
    return hasattr(getattr(model, "config", None), "to_dict")


def text_config(model: Any) -> Any:
    """The model's configuration; for a model of text and images, that of the text part.

    Raises:
        ValueError: the model has no configuration.
    """
    if not has_config(model):
        raise ValueError(
            f"prompt learning needs a transformers model; a {type(model).__name__} without a "
            "configuration of transformers' kind was given"
        )
    config = model.config  # runs in every call, so without to_dict(), which makes a deep copy
    return config.get_text_config() if "text_config" in vars(config) else config


def _layers_differ(config: Any) -> bool:
    return bool(getattr(config, "is_heterogeneous", False))


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    values = config.to_dict() if _layers_differ(config) else {}
    for name in names:
        value = getattr(config, name, None)
        if value is None:  # a size that differs between layers is no attribute
            value = values.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def attention_layers(config: PromptLearningConfig, model: Any) -> int:
    """The number of layers that get a prefix: all; in an encoder-decoder model, the decoder's."""
    assert config.num_layers is not None
    base = text_config(model)
    deep = _first(base, _DECODER_LAYERS) if getattr(base, "is_encoder_decoder", False) else None
    return deep or config.num_layers


def _key_sizes(model_config: Any, width: int | None, heads: int | None) -> tuple[int, int] | None:
    """(heads, head_dim) of the keys that attention caches; None when they are not known."""
    values = model_config.to_dict()
    if values.get("is_encoder_decoder") or values.get("is_decoder"):
        heads = values.get("decoder_attention_heads") or heads
    if values.get("multi_query") and not values.get("new_decoder_architecture"):
        if "num_key_value_heads" not in values and width and heads:  # Falcon
            return 1, width // heads
    if values.get("d_kv") and heads:  # T5
        return heads, values["d_kv"]
    if "num_key_value_heads" not in values:
        return (heads, width // heads) if width and heads else None
    kv_heads, head_dim = values["num_key_value_heads"], values.get("head_dim")
    if values.get("per_layer_config"):
        # sizes of the largest layer; the others take a part of the prefix
        head_dim = head_dim or (width or 0) // (heads or 1)
        for layer in values["per_layer_config"].values():
            if layer.get("head_dim", head_dim) > head_dim:
                kv_heads = layer.get("num_key_value_heads", values["num_key_value_heads"])
                head_dim = layer["head_dim"]
    if head_dim is None and width and heads:
        head_dim = width // heads
    return (kv_heads, head_dim) if kv_heads and head_dim else None


def _agree(name: str, given: int | None, allowed: tuple[int | None, ...], model: Any) -> None:
    wanted = sorted({value for value in allowed if value is not None})
    if given is not None and wanted and given not in wanted:
        raise ValueError(
            f"`{name}` is {given}, but {type(model).__name__} needs "
            f"{' or '.join(str(v) for v in wanted)}. Is the adapter for another base model?"
        )


def _required(name: str, value: int | None, model: Any) -> int:
    if value is None:
        raise ValueError(
            f"Please specify `{name}` in `peft_config`: it cannot be told from the configuration "
            f"of {type(model).__name__}"
        )
    return value


def infer_sizes(
    config: PromptLearningConfig, model: Any, word_embeddings: nn.Module | None
) -> dict[str, Any]:
    """The sizes for ``model``, {field of ``config``: size}; neither argument is changed.

    Args:
        config: its sizes that are None get a value; the others must fit the model.
        model: a transformers model.
        word_embeddings: its input embeddings.

    Raises:
        ValueError: a size differs from the model's, or is None and the model does not give it.
    """
    submodules = config.num_transformer_submodules
    if submodules is None:
        submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    sizes: dict[str, Any] = {"num_transformer_submodules": submodules}
    if _says_all(config) and not has_config(model):  # the model has no sizes to compare with
        if hasattr(config, "encoder_hidden_size"):
            sizes["encoder_hidden_size"] = config.encoder_hidden_size or config.token_dim
        return sizes
    model_config = text_config(model)
    layers = _first(model_config, _LAYERS)
    width, heads = _first(model_config, _WIDTH), _first(model_config, _HEADS)
    if PeftType(config.peft_type or "") is PeftType.PREFIX_TUNING:
        sizes |= _prefix_sizes(config, model, layers, width, heads)
    else:
        embedded = getattr(word_embeddings, "embedding_dim", None)
        _agree("token_dim", config.token_dim, (embedded,), model)
        sizes["token_dim"] = _required("token_dim", config.token_dim or embedded or width, model)
        sizes["num_layers"] = config.num_layers or layers
        sizes["num_attention_heads"] = config.num_attention_heads or heads
    if hasattr(config, "encoder_hidden_size"):
        sizes["encoder_hidden_size"] = config.encoder_hidden_size or sizes["token_dim"]
    return sizes


def _says_all(config: PromptLearningConfig) -> bool:
    return None not in (config.num_layers, config.token_dim, config.num_attention_heads)


def _prefix_sizes(
    config: PromptLearningConfig,
    model: Any,
    layers: int | None,
    width: int | None,
    heads: int | None,
) -> dict[str, Any]:
    model_config = text_config(model)
    # HF PEFT counts the encoder's layers, but the decoder's layers read the prefix
    deep = _first(model_config, _DECODER_LAYERS)
    if deep and model_config.is_encoder_decoder:
        layers = max(layers or 0, deep)
    elif deep and getattr(model_config, "is_decoder", False):  # BART's decoder alone
        layers = deep
    _agree("num_layers", config.num_layers, (layers,), model)
    sizes = {"num_layers": _required("num_layers", config.num_layers or layers, model)}
    key = _key_sizes(model_config, width, heads)
    if key is None:
        sizes["num_attention_heads"] = _required(
            "num_attention_heads", config.num_attention_heads, model
        )
        sizes["token_dim"] = _required("token_dim", config.token_dim or width, model)
        check_divides(sizes["token_dim"], sizes["num_attention_heads"])
        return sizes
    kv_heads, head_dim = key
    # the query's sizes are accepted too: HF PEFT accepts them, and its documentation shows them
    _agree("num_attention_heads", config.num_attention_heads, (kv_heads, heads), model)
    _agree("token_dim", config.token_dim, (kv_heads * head_dim, width), model)
    return sizes | {"num_attention_heads": kv_heads, "token_dim": kv_heads * head_dim}


def key_lenders(model: Any, num_layers: int) -> dict[int, int]:
    """{layer without keys of its own: the layer whose keys it attends to}.

    In Gemma 3n and 4 the last layers share the keys of the last layer before them of their kind.
    """
    config = text_config(model)
    own = num_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    kinds = getattr(config, "layer_types", None) or [None] * num_layers
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    return {layer: last[kinds[layer]] for layer in range(own, num_layers)}


def layer_shapes(model: Any, num_layers: int) -> list[tuple[int, int] | None]:
    """(key heads, head_dim) that each layer takes of a prefix; an empty list when all are alike.

    None for a layer that computes no keys of its own.
    """
    config = text_config(model)
    if not _layers_differ(config):
        return []
    borrowers = key_lenders(model, num_layers)
    each = [config.per_layer_config[layer] for layer in range(num_layers)]
    return [
        None if i in borrowers else (layer.num_key_value_heads, layer.head_dim)
        for i, layer in enumerate(each)
    ]
