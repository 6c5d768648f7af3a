"""Starts from decompositions of W (PiSSA, OLoRA, MiCA), and the orthogonal start."""

from __future__ import annotations

from typing import Any

import torch

from ....configs.lora import LoraConfig
from .residual import Start, current, minus_product, weight_of


def pissa(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """PiSSA (Meng et al., 2024, arXiv 2404.02948): the r leading singular triplets of W.

    W ≈ U S Vᵀ; A = √(S/s) Vᵀ and B = U √(S/s), so that s · B A is the best approximation of W of
    rank r. "pissa_niter_<k>" finds the triplets with k subspace iterations (Halko et al., 2009)
    from random numbers.
    """
    r, s = layer.r[adapter], layer.scaling[adapter]
    transposed = layer.fan_in_fan_out
    W = current(layer.get_base_layer().weight).to(torch.float32)
    W = W.T if transposed else W
    init = str(config.init_name)
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=int(init.rpartition("_")[2]))
        Vh = V.T
    root = (S / s).sqrt()
    return minus_product(root[:, None] * Vh, U * root, s, transposed)


def olora(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """OLoRA (Büyükakyüz, 2024, arXiv 2406.01775): factors of the QR decomposition W = Q R.

    A is the first r rows of R, B the first r columns of Q.
    """
    r = layer.r[adapter]
    Q, R = torch.linalg.qr(current(weight_of(layer.get_base_layer())).to(torch.float32))
    return minus_product(R[:r].contiguous(), Q[:, :r].contiguous(), layer.scaling[adapter])


def orthogonal(layer: Any, adapter: str, config: LoraConfig) -> Start:
    """The orthogonal start: B A = 0 although neither is zero. The base weight does not change.

    A gets the even rows and B the odd rows of one orthogonal [r, r] matrix, each multiplied with
    random numbers.
    """
    r = layer.r[adapter]
    Q = torch.linalg.qr(torch.randn(r, r))[0]
    A = (torch.randn(layer.in_features, r // 2) @ Q[0::2]).T / 10
    B = torch.randn(r // 2, layer.out_features).T @ Q[1::2] / 10
    return Start(A, B)


def mica(layer: Any, adapter: str, config: LoraConfig) -> Start | None:
    """MiCA (arXiv 2604.01694): B holds singular vectors of W and never trains; A starts at zero.

    They are the r left singular vectors of W [N, K] with the smallest singular values. An
    embedding's W is [embedding_dim, num_embeddings]. None while the weights are on the meta device,
    as a checkpoint brings both.
    """
    embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
    store = "lora_embedding_B" if embedding else "lora_B"
    layer.freeze_weight(adapter, store)
    weight = getattr(layer, store)[adapter]
    if (weight if embedding else weight.weight).is_meta:
        return None
    r = layer.r[adapter]
    W = current(weight_of(layer.get_base_layer())).to(torch.float32)
    W = W.T if embedding or layer.fan_in_fan_out else W
    U = torch.linalg.svd(W, full_matrices=False)[0]
    return Start(W.new_zeros(r, W.shape[1]), U[:, -r:])
