"""Statistics of paired comparisons against simulation and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics import Estimate, bootstrap, documents_for_power, mcnemar, non_inferiority


def simulate(
    rng: np.random.Generator,
    documents: int,
    seeds: int,
    *,
    documents_sd: float = 0.0,
    seeds_sd: float = 0.0,
    rest_sd: float = 1.0,
) -> np.ndarray:
    """Differences with effects of documents, of seeds, and of both together; mean 0."""
    return (
        documents_sd * rng.standard_normal((documents, 1))
        + seeds_sd * rng.standard_normal((1, seeds))
        + rest_sd * rng.standard_normal((documents, seeds))
    )


@pytest.mark.parametrize(
    ("documents", "seeds", "effects"),
    [
        (60, 1, {}),
        (60, 3, {}),
        (60, 3, {"documents_sd": 2.0}),
        (200, 8, {"documents_sd": 0.5, "seeds_sd": 0.15}),
    ],
)
def test_interval_covers_the_true_mean_as_often_as_stated(
    documents: int, seeds: int, effects: dict[str, float]
) -> None:
    # Resampling raw rows and columns covers 99% in the second case, ignoring how seeds differ 80% in
    # the last, and taking every (document, seed) for independent 81% in the third.
    rng = np.random.default_rng(1)
    runs = 400
    covered = 0
    for run in range(runs):
        estimate = bootstrap(
            [simulate(rng, documents, seeds, **effects)], bound=None, resamples=400, seed=run
        )
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.91 <= covered / runs <= 0.975  # standard error 1.1%


def test_standard_error_is_that_of_the_design() -> None:
    # Documents and single draws alone: var = sd_documents^2 / n + sd_rest^2 / (n seeds).
    rng = np.random.default_rng(2)
    found = [
        bootstrap([simulate(rng, 100, 4, documents_sd=0.5)], bound=None, resamples=1000, seed=run)
        for run in range(50)
    ]
    measured = math.sqrt(np.mean([estimate.standard_error**2 for estimate in found]))
    # The variance left to seeds is cut at zero, which adds a little where there is none.
    assert measured == pytest.approx(math.sqrt(0.25 / 100 + 1 / 400), rel=0.12)


def test_rare_changes_are_covered_and_none_is_no_certainty() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for run in range(400):
        lost = -(rng.random((200, 3)) < 0.004).astype(float)
        estimate = bootstrap([lost], resamples=400, seed=run)
        covered += estimate.low <= -0.004 <= estimate.high
    assert covered / 400 >= 0.95
    clean = bootstrap([np.zeros((200, 3))])
    # Three losses in 200: what a clean sheet cannot exclude at 95% ("rule of three").
    assert clean.low == pytest.approx(-3 / 200)
    assert clean.high == pytest.approx(3 / 200)
    assert bootstrap([np.zeros((200, 3))], bound=None).low == 0.0
    # As sure about ten tasks of 20 documents as about one task of 200.
    split = bootstrap([np.zeros((20, 3))] * 10)
    assert split.standard_error == pytest.approx(clean.standard_error, rel=0.15)


def test_strata_are_weighted() -> None:
    rng = np.random.default_rng(4)
    small, large = rng.standard_normal((10, 1)) + 1, rng.standard_normal((400, 1))
    equal = bootstrap([small, large], bound=None)
    assert equal.value == pytest.approx((small.mean() + large.mean()) / 2)
    pooled = bootstrap([small, large], [10, 400], bound=None)
    assert pooled.value == pytest.approx(np.concatenate([small, large]).mean())
    # Ten documents carry half the weight, so they make the error: sd / sqrt(10) / 2.
    made = small.mean(axis=1).std() / math.sqrt(10) / 2
    assert made < equal.standard_error < 1.5 * made
    assert equal.standard_error > 2 * pooled.standard_error


def test_bootstrap_repeats_and_reacts_to_confidence() -> None:
    differences = [np.random.default_rng(5).standard_normal((50, 3))]
    assert bootstrap(differences) == bootstrap(differences)
    assert bootstrap(differences).low != bootstrap(differences, seed=1).low
    wide = bootstrap(differences, confidence=0.99)
    assert wide.low < bootstrap(differences).low < bootstrap(differences, confidence=0.8).low


@pytest.mark.parametrize(
    ("strata", "message"),
    [
        ([], "at least one of each"),
        ([np.zeros((0, 3))], "at least one of each"),
        ([np.zeros(3)], r"\(documents, seeds\)"),
        ([np.zeros((3, 2)), np.zeros((3, 1))], "the same seeds"),
        ([np.array([[0.0], [np.nan]])], "must be finite"),
    ],
)
def test_bootstrap_refuses(strata: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(strata)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        # Twice the tail of a binomial distribution, from tables of (0.5, n).
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (8, 2, 0.109375),
        (10, 10, 1.0),
        (121, 59, 4.4342e-06),
    ],
)
def test_mcnemar_against_known_values(lost: int, gained: int, p: float) -> None:
    dense = [1] * lost + [0] * gained + [1, 1, 0]
    arm = [0] * lost + [1] * gained + [1, 1, 0]
    assert mcnemar(dense, arm) == (lost, gained, pytest.approx(p, rel=1e-4))


def test_mcnemar_holds_its_level_and_survives_many_changes() -> None:
    rng = np.random.default_rng(6)
    rejected = 0
    for _ in range(2000):
        first, second = rng.random(40) < 0.5, rng.random(40) < 0.5
        rejected += mcnemar(first.astype(int).tolist(), second.astype(int).tolist())[2] < 0.05
    assert 0.015 <= rejected / 2000 <= 0.05  # exact, hence never above
    assert 0 < mcnemar([1] * 5000 + [0] * 5200, [0] * 5000 + [1] * 5200)[2] < 0.06


def test_mcnemar_needs_right_or_wrong() -> None:
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5], [1.0])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        mcnemar([1.0], [1.0, 0.0])


@pytest.mark.parametrize("seeds", [1, 3])
def test_documents_for_power_give_that_power(seeds: int) -> None:
    # Arms that are equal: a share of documents is lost and as many gained, anew with every seed.
    margin, changed, documents = 0.02, 0.05, 1000
    rng = np.random.default_rng(7)

    def estimate(count: int, run: int) -> Estimate:
        drawn = rng.random((count, seeds))
        lost, gained = drawn < changed, drawn > 1 - changed
        return bootstrap([gained.astype(float) - lost], resamples=400, seed=run)

    errors = [estimate(documents, run).standard_error for run in range(100)]
    error = float(np.mean(errors))
    needed = documents_for_power(error, documents, margin)
    verdicts = [non_inferiority(estimate(needed, run), margin) for run in range(300)]
    assert 0.72 <= verdicts.count("non-inferior") / 300 <= 0.88  # standard error 2.3%
    if seeds == 1:  # the formula for paired proportions, its arithmetic done by hand
        assert needed == pytest.approx(7.849 * 2 * changed / margin**2, rel=0.05)
    assert documents_for_power(error, documents, margin / 2) == pytest.approx(4 * needed, rel=0.01)
    assert documents_for_power(error, documents, margin, power=0.9) > 1.2 * needed


def test_documents_for_power_needs_a_margin() -> None:
    with pytest.raises(ValueError, match="margin must be above 0"):
        documents_for_power(0.01, 100, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.019, 0.01, "non-inferior"),
        (-0.02, 0.01, "undecided"),
        (-0.05, -0.01, "undecided"),
        (-0.05, -0.021, "inferior"),
        (0.01, 0.02, "non-inferior"),
    ],
)
def test_verdict_follows_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert non_inferiority(Estimate((low + high) / 2, low, high, 0.01), 0.02) == verdict
