"""Statistics of paired comparisons: intervals over documents and seeds, McNemar's test, power.

Differences are those to dense on the same documents, as arrays of (documents, seeds): an arm's seeds are
crossed with its documents, as one seed is the key of the draws on all of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
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
        standard_error: of the value, from the variances of documents and seeds.
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
    """Interval of a mean over documents and seeds: a tilted bootstrap of documents, widened for seeds.

    Documents are resampled within strata, each with all its seeds: that covers how documents differ, and
    the chance of each draw. The interval's low end is the mean of that distribution on the observed
    differences, among those nearest to the sample, which would give a mean as high as the observed one
    with probability (1 - confidence) / 2; its high end likewise ([1], [2]). Of losses alone, or of none,
    that is the exact binomial limit; the percentiles of an untilted bootstrap are too short there.

    Documents without a single change cannot exclude a small loss. So one document that lost `bound` is
    drawn from too for the low end, and one that gained it for the high end; strata share it.

    Seeds' means also differ by the chance of single draws, which the documents already account for:
    seeds have the variance that analysis of variance leaves for them, often none (resampling raw rows
    and columns of a crossed array would count that chance up to three times: [3]). The two errors are
    independent, so the interval's halves are combined by their squares [4]. Two or three seeds cannot
    tell much about seeds: were their effects the largest part, the interval would be short.

    1. B. Efron, Nonparametric standard errors and confidence intervals, Canadian Journal of Statistics
       9 (1981), section 11.
    2. T. DiCiccio, J. Romano, Nonparametric confidence limits by resampling methods and least favorable
       families, International Statistical Review 58 (1990).
    3. A. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).
    4. G. Zou, A. Donner, Construction of confidence limits about effect measures: a general approach,
       Statistics in Medicine 27 (2008).

    Args:
        strata: differences of each task, (documents, seeds), with the same seeds; a mean over one task
            is one stratum.
        weights: of the strata in the mean; equal by default.
        confidence: of the two-sided interval.
        bound: largest possible difference of a document, or None for no added document.
        resamples: bootstrap replicates.
        seed: of the resampling.

    Raises:
        ValueError: an array is not (documents, seeds) with at least one of each, the strata have
            different numbers of seeds, or a value is not finite.
    """
    arrays, shares = _checked(strata, weights)
    by_seed = sum(share * array.mean(axis=0) for share, array in zip(shares, arrays, strict=True))
    value = float(np.mean(by_seed))
    variance, of_seeds = _variances(arrays, shares)
    for_seeds = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(of_seeds)
    documents = [array.mean(axis=1) for array in arrays]
    rng = np.random.default_rng(seed)
    tail = (1 - confidence) / 2
    below, above = (
        value * sign
        - _tilted_limit([sign * d for d in documents], shares, bound, tail, resamples, rng)
        for sign in (1, -1)
    )
    return Estimate(
        value,
        value - math.hypot(below, for_seeds),
        value + math.hypot(above, for_seeds),
        math.sqrt(variance + of_seeds),
    )


def _checked(
    strata: Sequence[np.ndarray], weights: Sequence[float] | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """The strata as arrays of (documents, seeds), and their shares of the mean."""
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not arrays or any(array.ndim != 2 or 0 in array.shape for array in arrays):
        raise ValueError("differences must be arrays of (documents, seeds), at least one of each")
    if any(array.shape[1] != arrays[0].shape[1] for array in arrays):
        raise ValueError("every task must have the same seeds")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("differences must be finite")
    shares = np.ones(len(arrays)) if weights is None else np.asarray(weights, dtype=np.float64)
    return arrays, shares / shares.sum()


def _tilted_limit(
    strata: Sequence[np.ndarray],
    shares: np.ndarray,
    bound: float | None,
    tail: float,
    resamples: int,
    rng: np.random.Generator,
) -> float:
    """The mean below the observed one under which as high a mean has probability `tail`.

    A document's value v has weight exp(tilt * share / documents * v), times the number of documents
    that have it. Replicates of the untilted weights serve every tilt: the ratio of their probabilities
    is exp(tilt * mean - cumulant(tilt)).
    """
    observed = sum(share * values.mean() for share, values in zip(shares, strata, strict=True))
    means = np.zeros(resamples)
    supports = []  # for each stratum: documents, steps of the mean by one of them, log weights
    for share, values in zip(shares, strata, strict=True):
        kinds, counts = np.unique(values, return_counts=True)
        likely = counts.astype(float)
        if bound is not None:
            kinds, likely = np.append(kinds, -bound), np.append(likely, 1 / len(strata))
        likely /= likely.sum()
        steps = share / len(values) * kinds
        means += rng.multinomial(len(values), likely, size=resamples) @ steps
        supports.append((len(values), steps, np.log(likely)))
    spread = sum(n * np.ptp(steps) for n, steps, _ in supports)
    worst = sum(n * steps.min() for n, steps, _ in supports)
    if spread == 0 or observed - worst <= 1e-9 * spread:
        return float(observed)  # no document can be worse
    as_high = means[means >= observed - 1e-9 * spread]

    def cumulant_and_mean(tilt: float) -> tuple[float, float]:
        cumulant = mean = 0.0
        for n, steps, log_likely in supports:
            exponents = log_likely + tilt * steps
            top = exponents.max()
            tilted = np.exp(exponents - top)
            cumulant += n * (top + math.log(tilted.sum()))
            mean += n * (tilted @ steps) / tilted.sum()
        return cumulant, mean

    def probability(tilt: float) -> float:
        cumulant, _ = cumulant_and_mean(tilt)
        return float(np.exp(tilt * as_high - cumulant).sum() / resamples)

    start, stop = 0.0, -1.0 / spread
    while probability(stop) > tail:
        start, stop = stop, 2 * stop
    for _ in range(40):
        middle = (start + stop) / 2
        start, stop = (middle, stop) if probability(middle) > tail else (start, middle)
    return min(float(observed), cumulant_and_mean(stop)[1])


def _variances(arrays: Sequence[np.ndarray], shares: np.ndarray) -> tuple[float, float]:
    """Variances of the mean over documents and seeds: by documents and single draws, and by seeds."""
    documents = sum(
        float(share**2 * array.mean(axis=1).var(ddof=1) / len(array)) if len(array) > 1 else 0.0
        for share, array in zip(shares, arrays, strict=True)
    )
    seeds = arrays[0].shape[1]
    if seeds == 1:
        return documents, 0.0
    chance = 0.0  # variance of a seed's mean by the interaction of documents and seeds
    for share, array in zip(shares, arrays, strict=True):
        rest = array - array.mean(axis=1, keepdims=True) - array.mean(axis=0) + array.mean()
        freedom = (len(array) - 1) * (seeds - 1)
        chance += share**2 * (rest**2).sum() / freedom / len(array) if freedom else 0.0
    by_seed = sum(share * array.mean(axis=0) for share, array in zip(shares, arrays, strict=True))
    return documents, max(0.0, float(np.var(by_seed, ddof=1) - chance)) / seeds


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
    strata: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    *,
    margin: float,
    bound: float = 1.0,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Documents with which the verdict "non-inferior" is reached as often as `power`, if arms are equal.

    The formula for paired proportions (Nam, Biometrics 53 (1997)): the smallest N with
    z_confidence sqrt((s02 + v) / N) + z_power sqrt(s2 / N) <= margin. s2 is the variance of a document
    in the pilot; s02 is that under a loss of the margin, with losses and gains tilted as by `bootstrap`
    and its added document among N: sqrt(s2^2 + 2 s2 bound^2 / N + (bound margin)^2). v / N is what seeds
    add to the interval. Few seeds add something by the chance of single draws, which more documents make
    smaller; that is what it is taken for.

    Args:
        strata, weights: differences of a pilot, as for `bootstrap`; N is divided among the strata as
            its documents are.
        margin: largest loss that counts as none, above 0.
        bound: largest possible difference of a document.
        power: probability of the verdict.
        confidence: of the two-sided interval that the verdict rests on.

    Raises:
        ValueError: `margin` is not above 0, or what `bootstrap` refuses.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    arrays, shares = _checked(strata, weights)
    documents = sum(map(len, arrays))
    variance, of_seeds = (documents * part for part in _variances(arrays, shares))
    # A document of a small stratum moves a mean over strata by more than one of N.
    step = bound * sum(
        float(share**2) * documents / len(array)
        for share, array in zip(shares, arrays, strict=True)
    )
    z_confidence = NormalDist().inv_cdf((1 + confidence) / 2)
    z_power = NormalDist().inv_cdf(power)

    def enough(count: int) -> bool:
        at_margin = math.sqrt(variance**2 + 2 * variance * step**2 / count + (step * margin) ** 2)
        error = z_confidence * math.sqrt(at_margin + of_seeds) + z_power * math.sqrt(variance)
        return error / math.sqrt(count) <= margin

    most = 1
    while not enough(most):
        most *= 2
    return bisect_left(range(most), True, key=enough, lo=1)


def non_inferiority(estimate: Estimate, margin: float) -> str:
    """What an interval says about a loss of `margin`: "non-inferior", "inferior" or "undecided"."""
    if estimate.low > -margin:
        return "non-inferior"
    return "inferior" if estimate.high < -margin else "undecided"
