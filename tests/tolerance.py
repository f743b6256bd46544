"""Every numeric bound of the tests, derived from the data of the case at hand.

Two kinds. A *rounding budget* bounds what floating point may do to a quantity against float64
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: a sum of n rounded
terms is off by at most gamma_n times the sum of their absolute values). A *statistical bound* is
the quantile that a correct implementation exceeds with probability `ALPHA` over the seed.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

# Chance that one test case, with all its comparisons together, rejects a correct implementation.
ALPHA = 1e-6

# exp, its argument's rounding, and the division by the sum: roundings per weight.
_EXP_ROUNDINGS = 6


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """Higham's gamma_n = n u / (1 - n u)."""
    nu = n * unit_roundoff(dtype)
    if nu >= 1:
        raise ValueError(f"{n} roundings in {dtype} leave no correct bit")
    return nu / (1 - nu)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores and averages are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score_budget(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """|error| of each score q.k * scaling computed in the working dtype: float64 (B, KVH, G, N).

    query (B, KVH, G, D), key (B, KVH, N, D). The scaling, the products and the additions round.
    """
    size = query.double().abs() @ key.double().abs().transpose(-1, -2) * abs(scaling)
    return gamma(query.shape[-1] + 2, working_dtype(query.dtype)) * size


def softmax_budget(
    scores: torch.Tensor, budget: torch.Tensor, tile: int, dtype: torch.dtype
) -> torch.Tensor:
    """Bound on sum_i |p~_i - p_i| for a softmax computed in tiles: float64 (...) from (..., N).

    scores: exact float64 scores, -inf where masked; budget: `score_budget` of them. An error d in a
    score changes its weight by the factor exp(d), and the cumulative sum inside a tile adds up to
    `tile` roundings; normalising at most doubles a relative error.
    """
    visible = scores > -torch.inf
    top = scores.amax(-1, keepdim=True)
    p = scores.softmax(-1)
    # exp(s - top) inherits the rounding of s - top, which is relative to its size.
    argument = unit_roundoff(dtype) * torch.where(visible, (top - scores), 0.0)
    shift = torch.where(visible, budget, 0.0)
    worst = shift.amax(-1, keepdim=True)
    relative = torch.expm1(shift + worst + argument) + gamma(tile + _EXP_ROUNDINGS, dtype)
    return 2 * (p * relative).sum(-1)


def average_budget(weight: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|error| of sum_s weight_s rows_s accumulated in the working dtype and rounded to `dtype`.

    weight float64 (..., S), rows (..., S, Dv): returns float64 (..., Dv).
    """
    size = (weight.abs().unsqueeze(-2) @ rows.double().abs()).squeeze(-2)
    # S products, S additions, the weight's own rounding and its sum where a row is drawn twice.
    accumulated = gamma(2 * weight.shape[-1] + 2, working_dtype(dtype)) * size
    # float16 loses relative precision below its smallest normal number.
    return accumulated + unit_roundoff(dtype) * (size + accumulated) + torch.finfo(dtype).tiny


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Decode attention as eager code has it, every step rounded to `dtype`: (B, H, 1, Dv)."""
    group = query.shape[1] // key.shape[1]
    keys = key.to(dtype).repeat_interleave(group, 1)
    scores = query.to(dtype) @ keys.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value.to(dtype).repeat_interleave(group, 1)


def attention_budget(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> float:
    """Largest |error| exact attention may have: eager's own in this dtype, and four roundings."""
    exact = attention(query, key, value, scaling, mask)
    eager = attention(query, key, value, scaling, mask, query.dtype)
    spare = 4 * unit_roundoff(query.dtype) * value.double().abs().max()
    return float((eager.double() - exact).abs().max() + spare)


def z_bound(comparisons: int) -> float:
    """Bonferroni bound on the largest |z| of so many two-sided comparisons."""
    return -NormalDist().inv_cdf(ALPHA / (2 * comparisons))


def assert_mean(
    estimates: torch.Tensor,
    expected: torch.Tensor,
    variance: torch.Tensor,
    floor: torch.Tensor | float,
) -> None:
    """The mean over the first axis equals `expected` within the z bound plus an absolute floor.

    estimates (R, ...): independent replicates. expected (...), variance (...): the analytic mean
    and variance of one replicate. floor: what rounding may add; it keeps the comparison defined
    where the variance is zero.
    """
    error = (estimates.double().mean(0) - expected).abs()
    deviation = (variance / estimates.shape[0]).sqrt()
    bound = z_bound(expected.numel()) * deviation + floor
    worst = (error - bound).argmax()
    assert bool((error <= bound).all()), (
        f"mean is off by {error.flatten()[worst]:.3e}, bound {bound.flatten()[worst]:.3e}, "
        f"standard error {deviation.flatten()[worst]:.3e}"
    )


def assert_uncorrelated(series: torch.Tensor) -> None:
    """Uniforms float64 (K, M) are pairwise uncorrelated: sqrt(M) r is nearly N(0, 1)."""
    centred = (series - 0.5) * math.sqrt(12)
    z = (centred @ centred.T) / math.sqrt(series.shape[1])
    pairs = torch.triu_indices(len(series), len(series), offset=1)
    z = z[pairs[0], pairs[1]].abs()
    assert z.max() < z_bound(len(z)), f"largest |z| of {len(z)} pairs is {z.max():.2f}"


def assert_uniform(series: torch.Tensor) -> None:
    """Uniforms float64 (M,) pass Kolmogorov-Smirnov and chi-square, each at ALPHA / 2."""
    m = series.numel()
    ordered = series.flatten().sort().values
    grid = torch.arange(m + 1, dtype=torch.float64) / m
    distance = max((grid[1:] - ordered).max(), (ordered - grid[:-1]).max())
    # Dvoretzky-Kiefer-Wolfowitz with Massart's constant: P(D > d) <= 2 exp(-2 m d^2).
    assert distance < math.sqrt(math.log(4 / ALPHA) / (2 * m)), f"KS distance {distance:.2e}"
    bins = 256
    counts = torch.bincount((ordered * bins).long(), minlength=bins).double()
    assert_chi_square(counts, torch.full_like(counts, m / bins))


def assert_chi_square(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Pearson's statistic is within the Laurent-Massart bounds of a chi-square, both sides."""
    k = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    x = math.log(4 / ALPHA)
    # P(X >= k + 2 sqrt(k x) + 2 x) <= exp(-x) and P(X <= k - 2 sqrt(k x)) <= exp(-x).
    low, high = k - 2 * math.sqrt(k * x), k + 2 * math.sqrt(k * x) + 2 * x
    assert low < statistic < high, f"chi-square {statistic:.1f} with {k} degrees of freedom"
