"""Principal components of data that come in batches (Ross et al., 2008, IJCV 77), in torch.

The interface is that of scikit-learn's ``IncrementalPCA``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """The leading principal components of all rows seen so far.

    Args:
        n_components: number to keep; None: the smaller of the first batch's rows and columns.
        copy: False lets the batches be overwritten.
        batch_size: number of rows that :meth:`fit` takes together; None: five times the columns.
        svd_driver: cuSOLVER's method for ``torch.linalg.svd``.
        lowrank: use ``torch.svd_lowrank``, which is faster and approximate.
        lowrank_q: its dimension, at least ``n_components``; None: twice ``n_components``.
        lowrank_niter: its number of subspace iterations.
        lowrank_seed: a seed that makes it reproducible; torch's generator does not change.

    After a fit: ``components_`` [n_components, F], ``singular_values_``, ``explained_variance_``,
    ``explained_variance_ratio_`` [n_components], ``mean_``, ``var_`` [F] (float64),
    ``noise_variance_``, ``n_samples_seen_``.
    """

    components_: Tensor
    singular_values_: Tensor
    n_samples_seen_: Any
    mean_: Any
    var_: Any

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError(
                    "n_components must be specified when using lowrank mode with lowrank_q=None."
                )
            lowrank_q = 2 * n_components
        elif lowrank and lowrank_q is not None and lowrank_q < (n_components or 0):
            raise ValueError("lowrank_q must be greater than or equal to n_components.")
        self.n_components = n_components
        self.copy = copy
        self.batch_size = batch_size
        self.svd_driver = svd_driver
        self.lowrank = lowrank
        self.lowrank_q = lowrank_q
        self.lowrank_niter = lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.n_features_: int | None = None

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Compute the components of the rows of X [M, F], in batches."""
        X = self._checked(X) if check_input else X
        rows, columns = X.shape
        self.batch_size = self.batch_size or 5 * columns
        for batch in self.gen_batches(rows, self.batch_size, self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Update the components with one batch X [M, F]; M and F are at least ``n_components``.

        The old components, scaled by their singular values, replace the rows seen before. One more
        row accounts for the shift of the mean.
        """
        X = self._checked(X) if check_input else X
        rows, columns = X.shape
        first = not hasattr(self, "components_")
        if first:
            self.n_features_ = columns
            self.n_components = self.n_components or min(rows, columns)
            self.n_samples_seen_ = torch.zeros(1, dtype=torch.long, device=X.device)
            self.mean_ = self.var_ = None
        if columns != self.n_features_:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the "
                "first batch."
            )
        before = self.n_samples_seen_
        mean, var, total = self._incremental_mean_and_var(X, self.mean_, self.var_, before)
        if first:
            X -= mean
        else:
            here = X.mean(dim=0)
            X -= here
            shift = (before.double() / total * rows).sqrt() * (self.mean_ - here)
            X = torch.vstack((self.singular_values_[:, None] * self.components_, X, shift))
        S, Vh = self._svd(X)
        variance = S**2 / (total - 1)
        n = self.n_components
        self.n_samples_seen_, self.mean_, self.var_ = total, mean, var
        self.components_, self.singular_values_ = Vh[:n], S[:n]
        self.explained_variance_ = variance[:n]
        self.explained_variance_ratio_ = (S**2 / (var * total).sum())[:n]
        if n in (rows, columns):
            self.noise_variance_ = torch.tensor(0.0, device=X.device)
        else:
            self.noise_variance_ = variance[n:].mean()
        return self

    def transform(self, X: Tensor) -> Tensor:
        """The coordinates [M, n_components] of the rows of X in the components."""
        X = X - self.mean_
        return (X.double() @ self.components_.T.double()).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of n rows, ``batch_size`` each; the last one also gets a rest of fewer rows.

        That is a rest of fewer than ``min_batch_size``.
        """
        start = 0
        for _ in range(int(n // batch_size)):
            end = start + batch_size
            if end + min_batch_size > n:
                continue
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Any) -> Tensor:
        data: Tensor = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        if data is X and self.copy:
            data = X.clone()
        rows, columns = data.shape
        n = self.n_components
        if n is not None and n > columns:
            raise ValueError(
                f"n_components={n} invalid for n_features={columns}, need more rows than columns "
                "for IncrementalPCA processing."
            )
        if n is not None and n > rows:
            raise ValueError(
                f"n_components={n} must be less or equal to the batch number of samples {rows}"
            )
        narrow = data.dtype not in (torch.float32, torch.float64)
        return data.to(torch.float32) if narrow else data

    def _svd(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """(singular values, right vectors [rank, F]); each vector's largest entry is positive."""
        if self.lowrank:
            seeded = self.lowrank_seed is not None
            with torch.random.fork_rng(enabled=seeded):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)
                _, S, V = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
            Vh = V.mH
        else:
            _, S, Vh = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
        return S, self._svd_flip(None, Vh, u_based_decision=False)[1]

    @staticmethod
    def _svd_flip(
        u: Tensor | None, v: Tensor, u_based_decision: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Singular vectors (columns of ``u``, rows of ``v``) with signs set by the largest entry.

        It is that of u, or with ``u_based_decision=False`` that of v, which becomes positive.
        """
        if u_based_decision:
            assert u is not None
            signs = u.gather(0, u.abs().argmax(0, keepdim=True))[0].sign()
        else:
            signs = v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0].sign()
        flipped = None if u is None else u * signs[: u.shape[1]]
        return flipped, v * signs[: v.shape[0], None]

    @staticmethod
    def _incremental_mean_and_var(
        X: Tensor, last_mean: Tensor | None, last_variance: Tensor | None, last_sample_count: Any
    ) -> tuple[Any, Any, Any]:
        """(mean [F], variance [F], number) of all rows, the rows X [M, F] included.

        (Chan et al., 1983.) In float64; the rounding error of the batch's variance is subtracted.
        """
        rows = X.shape[0]
        if rows == 0:
            return last_mean, last_variance, last_sample_count
        if last_sample_count > 0:
            for name, value in (("mean", last_mean), ("variance", last_variance)):
                if value is None:
                    raise ValueError(f"last_{name} should not be None if last_sample_count > 0.")
        new = torch.tensor([rows], device=X.device)
        total = last_sample_count + new
        new_sum = X.sum(dim=0, dtype=torch.float64)
        last_sum = 0.0 if last_mean is None else last_mean * last_sample_count
        centred = X - new_sum / new
        spread = (centred**2).sum(0, dtype=torch.float64)
        spread = spread - centred.sum(0, dtype=torch.float64) ** 2 / new
        if last_variance is not None:
            ratio = last_sample_count.double() / new
            spread = (
                last_variance * last_sample_count
                + spread
                + ratio / total * (last_sum / ratio - new_sum) ** 2
            )
        return (last_sum + new_sum) / total, spread / total, total
