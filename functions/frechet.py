"""Mean and covariance of streamed features, and the Frechet distance between two Gaussians.

Notation (Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", section 2; Dowson & Landau 1982):
    mu, S        mean (D,) and unbiased covariance (D, D) of one set of features
    B            a root of S: B B^T = S, (D, k) with k the numerical rank of S
    d^2          |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

The eigenvalues of S1^(1/2) S2 S1^(1/2) are those of B1^T S2 B1, so that two symmetric eigendecompositions replace the
square root of a product that is not symmetric.
"""

import numpy as np
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


class FeatureStats:
    """Running count, sum and sum of outer products in float64, on the device of the first features.

    Sums of any split of a set, in any order, agree to rounding; ranks and batches leave no trace.
    """

    def __init__(self, dim: int = 2048):
        self.dim = dim
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)                 # (D,)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)            # (D, D)

    def update(self, features) -> None:
        """Add features, a tensor or array (N, dim).

        Raises:
            ValueError: The shape is another one.
        """
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(features.shape)} given, (N, {self.dim}) expected")
        features = features.detach().to(torch.float64)                     # (N, D)
        if not self.count:
            self.total, self.outer = self.total.to(features.device), self.outer.to(features.device)
        self.count += len(features)
        self.total += features.sum(0).to(self.total.device)
        self.outer += (features.T @ features).to(self.outer.device)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Add the features that another object has seen; returns self."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of dimension {other.dim} cannot be added to those of dimension {self.dim}")
        self.count += other.count
        self.total += other.total.to(self.total.device)
        self.outer += other.outer.to(self.outer.device)
        return self

    @property
    def mean(self):
        """(dim,) float64 array. Raises ValueError when nothing was added."""
        if self.count < 1:
            raise ValueError("the mean of no features does not exist")
        return (self.total / self.count).cpu().numpy()

    @property
    def cov(self):
        """(dim, dim) float64 array, divided by count - 1. Raises ValueError below two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, {self.count} given")
        mean = self.total / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).cpu().numpy()


def covariance_root(sigma) -> Tensor:
    """B with B B^T = sigma, without the directions whose eigenvalue is rounding noise.

    The square root turns an eigenvalue of 1e-16 into 1e-8, which summed over 2,048 dimensions is seen in an FID.

    Args:
        sigma: Symmetric, positive semi-definite, (D, D).
    """
    eigenvalues, vectors = torch.linalg.eigh(_float64(sigma))              # (D,) ascending, (D, D)
    kept = eigenvalues > len(eigenvalues) * EPS * eigenvalues[-1].clamp(min=0)
    return vectors[:, kept] * eigenvalues[kept].sqrt()                     # (D, k)


def frechet_distance(mu1, sigma1, mu2, sigma2, *, root1: Tensor | None = None) -> float:
    """Squared Frechet distance d^2 of N(mu1, sigma1) and N(mu2, sigma2): the FID when these are of Inception features.

    Symmetric up to rounding, which is smallest when the set of lower rank (fewer samples) comes first.

    Args:
        mu1, mu2: Means, numpy or torch, (D,) or a number when D = 1.
        sigma1, sigma2: Covariances, symmetric, positive semi-definite, (D, D); they may be singular.
        root1: ``covariance_root(sigma1)``, for many distances to one set.

    Raises:
        ValueError: Shapes that do not agree, or values that are not finite.
    """
    mu1, mu2 = _float64(mu1).reshape(-1), _float64(mu2).reshape(-1)        # (D,)
    dim = len(mu1)
    sigma1, sigma2 = (_float64(sigma).reshape(1, 1) if dim == 1 else _float64(sigma) for sigma in (sigma1, sigma2))
    shapes = [tuple(mu2.shape), tuple(sigma1.shape), tuple(sigma2.shape)]
    if shapes != [(dim,), (dim, dim), (dim, dim)]:
        raise ValueError(f"means and covariances of shapes {(dim,)}, {', '.join(map(str, shapes))} do not agree")
    if not all(torch.isfinite(value).all() for value in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("means and covariances must be finite")
    root = covariance_root(sigma1) if root1 is None else root1             # (D, k)
    eigenvalues = torch.linalg.eigvalsh(root.T @ sigma2 @ root)            # (k,), those of S1^(1/2) S2 S1^(1/2)
    trace_root = eigenvalues.clamp(min=0).sqrt().sum()
    return float(((mu1 - mu2) ** 2).sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root)


def _float64(value) -> Tensor:
    if isinstance(value, np.ndarray):
        value = np.require(value, requirements="W")                        # of a pickle it is read-only: copied
    return torch.as_tensor(value).detach().to("cpu", torch.float64)
