"""Selection of the weights to adapt by their condition numbers.

The condition number κ is the largest singular value over the smallest. Weights with a small κ are
the least specialised, so that changing them loses the least.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def _kappa(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.float().flatten(1))  # in descending order
    return (values[0] / (values[-1] + 1e-8)).item()


class KappaTuneSelector:
    """The condition numbers of a model's linear layers and of the fused weights of its experts.

    They are computed once, when they are first needed; for a large model this takes minutes.

    Args:
        model: the base model.
        max_dim_size_to_analyze: weights with a larger dimension are skipped.
        moe_param_suffixes: ends of the names of 3-D parameters [experts, …, …].
        show_progress: True shows a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(moe_param_suffixes or MOE_SUFFIXES)
        self.show_progress = show_progress
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def _all(self, found: Iterable[tuple[str, Tensor]], what: str) -> dict[str, float]:
        """{name: mean κ over the matrices of a weight, [N, K] or [experts, N, K]}."""
        kappas = {}
        wanted = list(found)
        for name, weight in tqdm(wanted, desc=f"SVD of {what}", disable=not self.show_progress):
            matrices = weight if weight.dim() == 3 else weight[None]
            if max(matrices.shape[1:]) <= self.max_dim_size_to_analyze:
                kappas[name] = sum(map(_kappa, matrices)) / len(matrices)
        return kappas

    @torch.no_grad()
    def _compute(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._modules is None or self._parameters is None:
            linears = ((n, m.weight) for n, m in self.model.named_modules() if type(m) is nn.Linear)
            experts = (
                (n, p)
                for n, p in self.model.named_parameters()
                if p.dim() == 3 and n.endswith(self.moe_param_suffixes)
            )
            self._modules = self._all(linears, "linear layers")
            self._parameters = self._all(experts, "experts")
        return self._modules, self._parameters

    @staticmethod
    def _best(
        kappas: dict[str, float],
        top_p: float | None,
        num_modules: int | None,
        threshold: float | None,
    ) -> list[str]:
        names = sorted(kappas, key=lambda name: kappas[name])
        if num_modules is not None:
            return names[:num_modules]
        if top_p is not None:
            return names[: max(1, int(len(names) * top_p))]
        if threshold is not None:
            return [name for name in names if kappas[name] <= threshold]
        return names

    def get_best_targets(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """The names of linear layers with the smallest κ, in ascending order of κ.

        Args:
            top_p: share of the layers to return, at least one layer.
            num_modules: number of layers to return; used in place of ``top_p``.
            threshold: largest κ of the layers to return; used if the other two are None.
        """
        return self._best(self._compute()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self,
        top_p: float | None = None,
        num_modules: int | None = None,
        threshold: float | None = None,
    ) -> list[str]:
        """The names of experts' fused weights with the smallest κ, as :meth:`get_best_targets`."""
        return self._best(self._compute()[1], top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """The ``target_modules`` and ``target_parameters`` with the smallest condition numbers.

    A dict with these two keys, for a configuration; ``target_parameters`` is None without experts.

    Args:
        model: the base model.
        top_p: share of the layers, and of the experts' weights, to select.
        max_dim_size_to_analyze: as :class:`KappaTuneSelector`.
        moe_param_suffixes: as :class:`KappaTuneSelector`.
        show_progress: as :class:`KappaTuneSelector`.
    """
    selector = KappaTuneSelector(
        model, max_dim_size_to_analyze, moe_param_suffixes, show_progress=show_progress
    )
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
