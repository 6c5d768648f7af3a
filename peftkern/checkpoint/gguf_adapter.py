"""An adapter as a GGUF file that llama.cpp loads beside the base model's.

llama.cpp names tensors in its own way, reads alpha / r as the scale of every layer, and keeps the
rows of q and k of some families in another order (pairs of the rotation next to each other); B's
rows follow them. A is [r, K] and B [N, r]; of the embedding A is transposed, as rows are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files.atomic import write_atomically
from .plain import layers_of


class Family(NamedTuple):
    """llama.cpp's name of an architecture, and whether it reorders the rows of q and k."""

    arch: str
    reorders: bool = False


# {transformers' model_type: family}; those whose layers llama.cpp takes over one by one
FAMILIES = {
    "llama": Family("LLAMA", reorders=True),
    "mistral": Family("LLAMA", reorders=True),
    "granite": Family("GRANITE", reorders=True),
    "smollm3": Family("SMOLLM3", reorders=True),
    "qwen2": Family("QWEN2"),
    "qwen3": Family("QWEN3"),
    "gemma": Family("GEMMA"),
    "gemma2": Family("GEMMA2"),
    "gemma3_text": Family("GEMMA3"),
    "phi3": Family("PHI3"),
    "olmo2": Family("OLMO2"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gguf_tensors(
    base: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{llama.cpp's name: tensor} of an adapter in the plain form.

    Args:
        base: the base model's configuration (transformers').
        config: the values of ``adapter_config.json``.
        tensors: the adapter's, by names on disk.

    Raises:
        ValueError: a family or a layer that llama.cpp has not one by one, or an adapted output
            layer that is tied to the embedding.
    """
    import gguf

    family = FAMILIES.get(base.model_type)
    if family is None:
        raise ValueError(
            f"GGUF is written for {', '.join(sorted(FAMILIES))}; the base model is a "
            f"{base.model_type}. The plain form (`--to sglang`) is what llama.cpp's converter reads"
        )
    arch = gguf.MODEL_ARCH[family.arch]
    names = gguf.get_tensor_name_map(arch, base.num_hidden_layers)
    found = {}
    for layer in layers_of(config, tensors):
        name = names.get_name(f"{layer.name}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(f"llama.cpp has no tensor for the layer {layer.name}")
        if name == "output.weight" and base.tie_word_embeddings:
            raise ValueError(
                f"{layer.name} is adapted and tied to the embedding: llama.cpp has no tensor for it"
            )
        A, B = layer.A, layer.B
        if A.dim() != 2 or layer.embedding != (name == "token_embd.weight"):
            raise ValueError(f"llama.cpp reads A and B of linear layers; {layer.name} is none")
        if family.reorders and name.endswith(("attn_q.weight", "attn_k.weight")):
            B = _by_pairs(B, _heads(base, name))
        found[f"{name}.lora_a"] = A.T.contiguous() if layer.embedding else A
        found[f"{name}.lora_b"] = B
    return found


def _heads(base: Any, name: str) -> int:
    if name.endswith("attn_k.weight") and getattr(base, "num_key_value_heads", None):
        return int(base.num_key_value_heads)
    return int(base.num_attention_heads)


def _by_pairs(B: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs of one of each."""
    rows, r = B.shape
    halves = B.reshape(heads, 2, rows // heads // 2, r)
    return halves.transpose(1, 2).reshape(rows, r).contiguous()


def write_gguf(
    path: str | os.PathLike[str],
    base: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> int:
    """Write an adapter in the plain form as a GGUF file, atomically; return its tensors' number.

    Args:
        path: the file, ``.gguf``.
        base, config, tensors: as in :func:`gguf_tensors`.
        dtype: of the tensors in the file: one of ``DTYPES``.
        name: the adapter's name in the file.

    Raises:
        ValueError: as :func:`gguf_tensors`; nothing is written then.
        ImportError: the package ``gguf`` is not installed.
    """
    import gguf

    found = gguf_tensors(base, config, tensors)
    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[FAMILIES[base.model_type].arch]]
    kinds = dict(zip(DTYPES, ("F32", "F16", "BF16"), strict=True))
    kind = gguf.GGMLQuantizationType[kinds[dtype]]
    file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}

    def write(tmp: str) -> None:
        writer = gguf.GGUFWriter(tmp, arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        if name:
            writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[file_types[kinds[dtype]]])
        for key, tensor in found.items():
            data = gguf.quants.quantize(tensor.detach().float().cpu().numpy(), kind)
            writer.add_tensor(key, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)
    return len(found)
