"""``Frozen``: weights of an adapter that never train, whatever else is made to train (MiCA's B)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from ...utils.module_tree import set_layer_requires_grad
from ..base_layer import BaseTunerLayer


class Frozen(BaseTunerLayer):
    """The part of a LoRA layer that remembers its frozen weights, in HF PEFT's attribute."""

    # {adapter: names of the stores that hold a frozen weight of it}; shared and empty until a layer
    # needs its own
    frozen_peft_weight_names: Any = MappingProxyType({})

    def freeze_weight(self, adapter: str, store: str) -> None:
        """Freeze the adapter's weight in ``store`` ("lora_B", …), now and after later switches."""
        if isinstance(self.frozen_peft_weight_names, MappingProxyType):
            self.frozen_peft_weight_names = {}
        self.frozen_peft_weight_names[adapter] = (store,)
        self._freeze_again()

    def _freeze_again(self) -> None:
        for adapter, stores in self.frozen_peft_weight_names.items():
            for store in stores:
                found = getattr(self, store)
                if adapter in found:
                    set_layer_requires_grad(found[adapter], False)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        if self.frozen_peft_weight_names:
            self._freeze_again()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        if self.frozen_peft_weight_names:
            self._freeze_again()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]
        super().delete_adapter(adapter_name)
