"""Statistics of paired comparisons: bootstrap over documents and seeds, McNemar's test, power.

Differences are those to dense on the same documents, as arrays of (documents, seeds): an arm's seeds are
crossed with its documents, as one seed is the key of the draws on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = ["Estimate", "bootstrap", "documents_for_power", "mcnemar", "non_inferiority"]

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its uncertainty.

    Attributes:
        value: the weighted mean over strata of the mean over documents and seeds.
        low, high: ends of the two-sided interval.
        standard_error: standard deviation of the bootstrap distribution.
    """

    value: float
    low: float
    high: float
    standard_error: float


def bootstrap(
    strata: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    bound: float | None = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of a mean over documents and seeds, resampling both.

    Documents are resampled within strata, each with all its seeds: that covers how documents differ, and
    the chance of each draw. To every replicate is added the mean of as many seeds' effects, resampled
    from those observed. Seeds' means also differ by the chance of single draws, which the documents
    already account for, so effects are first scaled to the variance that analysis of variance leaves
    for them, often none (residuals scaled to their variance component: [1]; resampling raw rows and
    columns of a crossed array would count that chance up to three times: [2]). Two or three seeds
    cannot tell much about seeds: were their effects the largest part, the interval would be short.

    Without a single changed document a bootstrap interval has no length, though as many documents
    cannot exclude a small loss. So one document that lost `bound` is drawn from too, and one that
    gained it, as [3] does for paired proportions; strata share the two.

    1. J. Carpenter, H. Goldstein, J. Rasbash, A novel bootstrap procedure for assessing the
       relationship between class size and achievement, Applied Statistics 52 (2003).
    2. A. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).
    3. D. Bonett, R. Price, Adjusted Wald confidence interval for a difference of binomial proportions
       based on paired data, Journal of Educational and Behavioral Statistics 37 (2012).

    Args:
        strata: differences of each task, (documents, seeds), with the same seeds; a mean over one task
            is one stratum.
        weights: of the strata in the mean; equal by default.
        confidence: of the two-sided interval.
        bound: largest possible difference of a document, or None for no added documents.
        resamples: bootstrap replicates.
        seed: of the resampling.

    Raises:
        ValueError: an array is not (documents, seeds) with at least one of each, the strata have
            different numbers of seeds, or a value is not finite.
    """
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not arrays or any(array.ndim != 2 or 0 in array.shape for array in arrays):
        raise ValueError("differences must be arrays of (documents, seeds), at least one of each")
    seeds = arrays[0].shape[1]
    if any(array.shape[1] != seeds for array in arrays):
        raise ValueError("every task must have the same seeds")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("differences must be finite")
    shares = np.ones(len(arrays)) if weights is None else np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    by_seed = sum(share * array.mean(axis=0) for share, array in zip(shares, arrays, strict=True))
    value = float(np.mean(by_seed))

    rng = np.random.default_rng(seed)
    effects = _seed_effects(by_seed, arrays, shares)
    means = effects[rng.integers(seeds, size=(resamples, seeds))].mean(axis=1)
    for share, array in zip(shares, arrays, strict=True):
        documents = array.mean(axis=1)
        likely = np.ones(len(array))
        if bound is not None:
            documents = np.append(documents, [bound, -bound])
            likely = np.append(likely, [1 / len(arrays)] * 2)
        # Documents with equal differences are interchangeable: draw how many of each kind.
        kinds, kind = np.unique(documents, return_inverse=True)
        likely = np.bincount(kind, likely) / likely.sum()
        means += share * (rng.multinomial(len(array), likely, size=resamples) @ kinds) / len(array)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), float(means.std(ddof=1)))


def _seed_effects(
    by_seed: np.ndarray, arrays: Sequence[np.ndarray], shares: np.ndarray
) -> np.ndarray:
    """What each seed adds to the mean, scaled to the variance that is not chance of single draws."""
    seeds = len(by_seed)
    effects = by_seed - by_seed.mean()
    if seeds == 1:
        return effects
    chance = 0.0  # variance of a seed's mean by the interaction of documents and seeds
    for share, array in zip(shares, arrays, strict=True):
        documents = len(array)
        rest = array - array.mean(axis=1, keepdims=True) - array.mean(axis=0) + array.mean()
        freedom = (documents - 1) * (seeds - 1)
        chance += share**2 * (rest**2).sum() / freedom / documents if freedom else 0.0
    variance = max(0.0, effects.var(ddof=1) - chance)
    return effects * math.sqrt(variance / effects.var()) if variance else np.zeros(seeds)


def mcnemar(dense: Sequence[float], arm: Sequence[float]) -> tuple[int, int, float]:
    """McNemar's exact test of two arms on the same documents, each answered right (1) or wrong (0).

    Returns:
        Documents that dense alone answers, documents that the arm alone answers, and the two-sided
        p-value: of as uneven a split of those documents, were either side as likely.

    Raises:
        ValueError: a score is neither 0 nor 1, or the lengths differ.
    """
    pairs = list(zip(dense, arm, strict=True))
    if any(score not in (0, 1) for pair in pairs for score in pair):
        raise ValueError("McNemar's test needs scores of 0 and 1")
    lost = sum(d > a for d, a in pairs)
    gained = sum(d < a for d, a in pairs)
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    # Whole numbers up to here: 2 ** changed overflows a float.
    return lost, gained, min(1.0, 2 * tail / 2**changed)


def documents_for_power(
    standard_error: float,
    documents: int,
    margin: float,
    *,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Documents with which the verdict "non-inferior" is reached as often as `power`, if arms are equal.

    The lower end of the interval lies about z standard errors below the difference; it must stay above
    -margin, and the standard error falls as the square root of the documents:
    N = documents * ((z_confidence + z_power) * standard_error / margin)^2.

    Args:
        standard_error: of the difference, measured on `documents` documents.
        documents: how many those were.
        margin: largest loss that counts as none, above 0.
        power: probability of the verdict.
        confidence: of the two-sided interval that the verdict rests on.

    Raises:
        ValueError: `margin` is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    z = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(power)
    return math.ceil(documents * (z * standard_error / margin) ** 2)


def non_inferiority(estimate: Estimate, margin: float) -> str:
    """What an interval says about a loss of `margin`: "non-inferior", "inferior" or "undecided"."""
    if estimate.low > -margin:
        return "non-inferior"
    return "inferior" if estimate.high < -margin else "undecided"
