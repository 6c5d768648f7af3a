"""MonteCLoRA: LoRA trained with random perturbations of A, whose size is learned.

It is HF PEFT's variant of Monte Carlo enhanced low-rank adaptation. In a training call A [r, K] is
replaced by A + ε Σ_n w_n (z_n √v)ᵀ with

    v = max(e^{2 s} ⊙ diag(Z), 0.001)                     Z ~ Wishart(r degrees, I), s [r] trains
    w = softmax(log α - mean(log α) + √σ ⊙ z)              α = e^a, a [samples] trains
    σ = (1 - 2 / samples) / α + Σ (1 / α) / samples²       the normal approximation of Dirichlet(α)

and z, z_n [K, r] normal; ε is ``sample_scaler``. Merged and outside training the adapter is B A.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.wishart import Wishart
from torch.nn.functional import linear, softmax

from ...ops import autocast
from ...utils.device import infer_device
from ...utils.private import bartlett, in_backward
from ..base_layer import as_names
from .base import LoraLayer
from .training_variants import TrainedOtherwise


class Draws:
    """Random numbers for ``buffer_size`` calls, drawn together, in HF PEFT's order."""

    def __init__(self, sampler: MontecloraSampler, buffer_size: int, device: Any) -> None:
        self.shape = (sampler.num_samples, sampler.in_features, sampler.out_features)
        self.dtype, self.buffer_size, self.device = sampler.dtype, buffer_size, device
        self.left: list[tuple[Tensor, Tensor, Tensor]] = []
        if torch.device(device).type != "meta":
            self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        (samples, _, r), count = self.shape, self.buffer_size
        place = {"device": self.device, "dtype": self.dtype}
        noise = torch.randn(count, *self.shape, **place)
        of_weights = torch.randn(count, samples, **place)
        source = Wishart(r, scale_tril=torch.eye(r, device=self.device))
        # only the diagonal is used
        of_variances = [bartlett(source).diag() for _ in range(count)]
        variances = torch.stack(of_variances).to(noise.dtype)
        self.left = list(zip(noise, variances, of_weights, strict=True))[::-1]

    def get(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(z_n [samples, K, r], diag(Z) [r], z [samples]) for the next call."""
        if not self.left:
            if torch.device(self.device).type == "meta":
                self.device = device
            self.draw()
        return tuple(t.to(device, dtype) for t in self.left.pop())  # type: ignore[return-value]


class MontecloraSampler(nn.Module):
    """The perturbations of one adapter of one layer.

    Args:
        in_features: K.
        out_features: the rank r.
        num_samples, use_entropy, dirichlet_prior, sample_scaler, kl_loss_weight, buffer_size: see
            :class:`MontecloraConfig`.
        device: the device on which numbers are drawn; None: the accelerator, if there is one.
            "meta": parameters are to be assigned, and numbers are drawn at the first call.
        dtype: dtype of the parameters and the random numbers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_samples = (
            in_features,
            out_features,
            num_samples,
        )
        self.use_entropy, self.dirichlet_prior = use_entropy, dirichlet_prior
        self.sample_scaler, self.kl_loss_weight = sample_scaler, kl_loss_weight
        self.device = infer_device() if device is None else device
        self.dtype = dtype
        r, samples = out_features, num_samples
        with torch.device("meta" if torch.device(self.device).type == "meta" else "cpu"):
            self.std_prior = nn.Parameter(torch.rand(r, dtype=dtype))
            self.expert_weights_prior = nn.Parameter(torch.rand(samples, dtype=dtype))
            self.register_buffer("gaussian_var_prior", torch.eye(r, dtype=dtype))
            self.register_buffer("expert_weights", torch.full((samples,), 1 / samples, dtype=dtype))
        self.sampler = Draws(self, buffer_size, self.device)
        # v [r] and w [samples] of the last call, with their graph
        self._last: tuple[Tensor, Tensor] | None = None
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        self.to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_drawn": None}  # a graph cannot be copied

    def _next(self) -> tuple[Tensor, Tensor, Tensor]:
        """(z_n [samples, K, r], v [r], w [samples]) of a call; v and w are kept for the loss."""
        s, a = self.std_prior, self.expert_weights_prior
        # inside a backward this is a checkpoint's recomputation, which reuses the forward's numbers
        if self._drawn is None or not in_backward():
            self._drawn = self.sampler.get(s.device, s.dtype)
        z, of_variance, of_weights = self._drawn
        v = (torch.exp(2 * s) * of_variance).clamp(min=1e-3)
        alpha = a.exp().clamp(min=1e-6)
        samples, inverse, log = self.num_samples, 1 / alpha, alpha.log()
        spread = inverse * (1 - 2 / samples) + inverse.sum() / samples**2
        spread = spread.clamp(min=1e-6) + 1e-6
        w = softmax(log - log.mean() + spread.sqrt() * of_weights, dim=-1)
        self._last = v, w
        self.gaussian_var_prior, self.expert_weights = v.detach().diag(), w.detach()
        return z, v, w

    def forward(self) -> tuple[Tensor, Tensor]:
        """(perturbations [samples, K, r], their weights [samples]) of a call."""
        z, v, w = self._next()
        return self.sample_scaler * torch.nan_to_num(z * v.sqrt(), nan=1e-3), w

    def perturbation(self) -> Tensor:
        """The weighted sum of the perturbations of :meth:`forward`, [r, K]."""
        z, v, w = self._next()
        mean = (w @ z.flatten(1)).view(z.shape[1:])
        return (self.sample_scaler * mean * v.sqrt()).t()

    def get_variational_loss(self) -> tuple[Tensor | float, Tensor | float]:
        """(divergences from the priors, entropy) of the last call; zeros outside training."""
        if not self.training:
            return 0.0, 0.0
        last: Any = self._last or (self.gaussian_var_prior.diag(), self.expert_weights)
        kl = self._weights_kl() + self._scale_kl() + self._variance_kl(last[0])
        return self.kl_loss_weight * kl, last[1].square().sum() if self.use_entropy else 0

    def _weights_kl(self) -> Tensor:
        """HF PEFT's divergence of Dirichlet(α) from the prior, a scalar.

        Computed with logarithms of the gamma function; HF PEFT's own value is infinite from 36 on.
        """
        alpha = self.expert_weights_prior.exp()
        prior = torch.full_like(alpha, self.dirichlet_prior)
        whole, gamma = alpha.sum(), torch.lgamma
        return (
            gamma(whole)
            - gamma(prior.sum())
            + (gamma(alpha) - gamma(prior)).sum()
            + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(whole))).sum()
        )

    def _scale_kl(self) -> Tensor:
        r, variances = self.out_features, torch.exp(2 * self.std_prior)
        return 0.5 * (r * (variances.sum() - 2 * self.std_prior.sum()) - r**2)

    def _variance_kl(self, v: Tensor) -> Tensor:
        v = v.clamp(min=1e-6)
        return 0.5 * self.num_samples * (v.sum() - v.log().sum() - self.out_features)


def variational_loss(model: nn.Module, adapter_names: str | list[str] | None = None) -> Any:
    """The mean, over layers and adapters, of the loss that MonteCLoRA adds to the task's.

    Args:
        model: a LoraModel.
        adapter_names: the adapters; None: the active ones.

    Returns:
        A scalar tensor with a graph to the last call; 0.0 when no adapter is of MonteCLoRA.
    """
    active: Any = model.active_adapters
    names = as_names(active if adapter_names is None else adapter_names)
    found: list[Any] = []
    for layer in model.modules():
        samplers = (
            getattr(layer, "lora_monteclora_sampler", {}) if isinstance(layer, LoraLayer) else {}
        )
        found += [sum(samplers[n].get_variational_loss()) for n in names if n in samplers]
    return sum(found) / len(found) if found else 0.0


class MontecloraLinearVariant(TrainedOtherwise, setting="monteclora_config", layers=("linear",)):
    """MonteCLoRA on linear layers; the adapter's files include ``lora_monteclora_sampler``."""

    name = "MonteCLoRA"
    weight_stores = {"lora_monteclora_sampler": nn.ModuleDict}
    model_methods = {"_get_monteclora_loss": variational_loss}

    def init(self, layer: Any, adapter: str, config: Any, trainable: bool) -> None:
        own, A = config.monteclora_config, layer.lora_A[adapter].weight
        sampler = MontecloraSampler(
            in_features=layer.in_features,
            out_features=A.shape[0],
            num_samples=own.num_samples,
            use_entropy=own.use_entropy,
            dirichlet_prior=own.dirichlet_prior,
            sample_scaler=own.sample_scaler,
            kl_loss_weight=own.kl_loss_weight,
            buffer_size=own.buffer_size,
            device=A.device,
            dtype=layer._base_dtype(),  # HF PEFT draws in this dtype
        )
        for parameter in sampler.parameters():  # buffers take this dtype at the first call
            parameter.data = parameter.data.to(A.dtype)
        sampler.requires_grad_(trainable).train(layer.training)
        layer.lora_monteclora_sampler[adapter] = sampler

    def differs(self, layer: Any) -> bool:
        return layer.training

    def update(self, layer: Any, adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if not self.differs(layer):
            return result + layer._update(adapter, x)
        A: Tensor = layer.lora_A[adapter].weight
        if not autocast.is_on(x):
            x = layer._cast_input_dtype(x, A.dtype)
        x = layer.lora_dropout[adapter](x)
        with torch.autocast(x.device.type, enabled=False):
            noise = layer.lora_monteclora_sampler[adapter].perturbation()
        if noise.isnan().any():
            warnings.warn("Monteclora sampling produced NaNs, using base weights.", stacklevel=2)
        else:
            A = A + noise
        return result + layer.lora_B[adapter](linear(x, A)) * layer.scaling[adapter]


class MontecloraTrainerMixin:
    """Mixin for transformers' ``Trainer`` that adds MonteCLoRA's loss to the task's.

    Name it before ``Trainer`` (or a subclass) among the bases of a class.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """``Trainer.compute_loss`` plus the mean MonteCLoRA loss of LoRA models in ``model``."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        tuners = [m for m in model.modules() if hasattr(type(m), "_get_monteclora_loss")]
        more = sum(m._get_monteclora_loss() for m in tuners) / max(len(tuners), 1)  # type: ignore
        return (found[0] + more, found[1]) if return_outputs else found + more
