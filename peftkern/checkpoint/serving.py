"""What vLLM, SGLang and llama.cpp can do with an adapter: one table of rules for each.

The rules are those of the programs' own code, in the versions of ``TARGETS``; of llama.cpp, of
``convert_lora_to_gguf.py`` in November 2026. Where a program reads
a setting wrongly and says nothing, that counts as a refusal here: an answer that is silently wrong
is worse than none. ``mended`` tells which of them the plain form of :mod:`.plain` does away with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

TARGETS = {
    "vllm": "vLLM 0.33",
    "sglang": "SGLang 0.5.23",
    "gguf": "llama.cpp's converter",
}
MAX_RANK = 512  # the largest --max-lora-rank that vLLM takes

FACTOR = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")
# copies of the base model's embeddings, which the programs pass over
BASE_COPY = re.compile(r"\.(?:embed_tokens|lm_head)\.(?:base_layer\.)?weight$")
# starts that take s B A out of the base weights when the adapter is made
CHANGES_BASE = ("pissa", "olora", "corda")
# starts that draw A and B alone; vLLM takes these names and no other
_DRAWS_ONLY = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


class Adapter(NamedTuple):
    """The files of an adapter: the values of its configuration, and {name: shape} of its tensors.

    ``max_rank`` is the largest rank that the program is started for.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    max_rank: int = MAX_RANK

    def asks(self, setting: str) -> Any:
        return self.config.get(setting)


class Rule(NamedTuple):
    """A reason why programs do not read an adapter.

    Args:
        found: the reason in an adapter, as a phrase; None when it has none.
        targets: the programs that refuse it, or compute something else.
        mended: True when the plain form does without it.
    """

    found: Callable[[Adapter], str | None]
    targets: tuple[str, ...]
    mended: bool = False


_ALL = ("vllm", "sglang", "gguf")


def _setting(name: str, said: str) -> Callable[[Adapter], str | None]:
    return lambda adapter: said if adapter.asks(name) else None


def _method(adapter: Adapter) -> str | None:
    method = adapter.asks("peft_type")
    return None if method == "LORA" else f"{method} (they read LoRA alone)"


def _bias(adapter: Adapter) -> str | None:
    bias = adapter.asks("bias")
    return None if bias in (None, "none") else f'bias="{bias}" (trained biases)'


def _modules(adapter: Adapter, allowed: Iterable[str]) -> str | None:
    found = [name for name in adapter.asks("modules_to_save") or () if name not in allowed]
    return f"modules_to_save: {', '.join(sorted(found))}" if found else None


def _modules_in_vllm(adapter: Adapter) -> str | None:
    return _modules(adapter, ("classifier", "score"))


def _modules_elsewhere(adapter: Adapter) -> str | None:
    return _modules(adapter, ())


def _changed_base(adapter: Adapter) -> str | None:
    start = str(adapter.asks("init_lora_weights")).lower()
    changes = start.startswith(CHANGES_BASE)
    return f'init_lora_weights="{start}" (it changes the base weights)' if changes else None


def _unknown_start(adapter: Adapter) -> str | None:
    start = adapter.asks("init_lora_weights")
    if not isinstance(start, str) or start.lower() in _DRAWS_ONLY:
        return None
    return None if _changed_base(adapter) else f'init_lora_weights="{start}"'


def _loftq(adapter: Adapter) -> str | None:
    start = str(adapter.asks("init_lora_weights")).lower()
    return 'init_lora_weights="loftq" (its base weights are others)' if start == "loftq" else None


def _patterns(adapter: Adapter) -> str | None:
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = [
        name
        for name, pattern, usual in (
            ("rank_pattern", ranks, config.get("r")),
            ("alpha_pattern", alphas, config.get("lora_alpha")),
        )
        if any(value != usual for value in pattern.values())
    ]
    return f"{' and '.join(found)} (one rank and scale for all layers are read)" if found else None


def _rank(adapter: Adapter) -> str | None:
    ranks = [shape[0] for name, shape in adapter.shapes.items() if name.endswith("lora_A.weight")]
    rank = max([adapter.asks("r") or 0, *ranks])
    if adapter.asks("target_parameters"):  # experts share one tensor
        rank = adapter.asks("r") or 0
    return f"rank {rank} is above {adapter.max_rank}" if rank > adapter.max_rank else None


def _one_string(adapter: Adapter) -> str | None:
    targets = adapter.asks("target_modules")
    named = not isinstance(targets, str) or targets in ("all-linear", "all")
    return None if named else f"target_modules is the pattern {targets!r} (a list is read)"


def _other_tensors(adapter: Adapter) -> str | None:
    if adapter.asks("peft_type") != "LORA":
        return None
    expected = ("modules_to_save", "lora_bias", "use_dora", "trainable_token_indices")
    if any(adapter.asks(name) for name in expected) or _bias(adapter):
        return None  # a rule of its own names them
    known = (FACTOR, BASE_COPY)
    found = [name for name in adapter.shapes if not any(p.search(name) for p in known)]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"tensors besides A and B: {found[0]}{more}" if found else None


RULES = (
    Rule(_method, _ALL),
    Rule(_setting("use_dora", "DoRA (use_dora)"), _ALL),
    Rule(_setting("lora_bias", "lora_bias"), _ALL),
    Rule(_bias, _ALL),
    Rule(_modules_in_vllm, ("vllm",)),
    Rule(_modules_elsewhere, ("sglang", "gguf")),
    Rule(_setting("trainable_token_indices", "trainable_token_indices (single tokens)"), _ALL),
    Rule(_setting("alora_invocation_tokens", "aLoRA (alora_invocation_tokens)"), _ALL),
    Rule(_setting("layer_replication", "layer_replication"), _ALL),
    Rule(_setting("use_bdlora", "BD-LoRA (use_bdlora)"), _ALL),
    Rule(_setting("use_qalora", "QA-LoRA (use_qalora)"), _ALL),
    Rule(_setting("kasa_config", "KaSA (it changes the base weights)"), _ALL),
    Rule(_setting("arrow_config", "Arrow (arrow_config)"), _ALL),
    Rule(_setting("target_parameters", "target_parameters (experts)"), ("sglang", "gguf")),
    Rule(_changed_base, _ALL, mended=True),
    Rule(_loftq, _ALL),
    Rule(lambda adapter: None if _loftq(adapter) else _unknown_start(adapter), ("vllm",)),
    Rule(_setting("use_rslora", "rsLoRA (alpha / r is read)"), ("sglang", "gguf"), mended=True),
    Rule(_patterns, ("sglang", "gguf"), mended=True),
    Rule(_one_string, ("sglang",), mended=True),
    Rule(_rank, ("vllm",)),
    Rule(_other_tensors, _ALL),
)


def refusals(target: str, adapter: Adapter, mended: bool | None = None) -> list[str]:
    """The reasons why ``target`` does not read the adapter as it is, as phrases.

    Args:
        target: a key of ``TARGETS``.
        adapter: the adapter's files.
        mended: only reasons that the plain form does away with (True) or does not (False).
    """
    rules = [r for r in RULES if target in r.targets and mended in (None, r.mended)]
    return [reason for rule in rules if (reason := rule.found(adapter))]


def refused_by_servers(adapter: Adapter) -> str | None:
    """One line about the programs that do not read an adapter as it is; None when all do.

    Methods other than LoRA are not for them, and give None.
    """
    if adapter.asks("peft_type") != "LORA":
        return None
    by_reason: dict[str, list[str]] = {}
    for target in ("vllm", "sglang"):
        for reason in refusals(target, adapter):
            by_reason.setdefault(reason, []).append(TARGETS[target])
    if not by_reason:
        return None
    said = [f"{' and '.join(names)}: {reason}" for reason, names in by_reason.items()]
    mended = all(not refusals(target, adapter, mended=False) for target in ("vllm", "sglang"))
    command, what = ("export", "what they read") if mended else ("merge", "weights for them")
    return f"not read, or read wrongly, by {'; '.join(said)}. `peftkern {command}` writes {what}."
