"""E[o_hat] = o, for every estimator and both allocations, and how large the error is.

Where the randomness is one or two uniforms (systematic), or enters linearly (one uniform per draw),
the expectation is an integral of a step function: it is computed exactly, interval by interval, by
handing the reference chosen uniforms. Tests over fixed seeds then show that the uniforms of the
counter RNG realise that expectation together, with the analytic variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tolerance import (
    assert_chi_square,
    assert_mean,
    score_budget,
    softmax_budget,
    unit_roundoff,
)
from torch.nn.functional import pad

from santa_hf import reference
from santa_hf.rng import Stream

TILE, FIXED_TILE = reference.TILE, reference.FIXED_TILE
each_estimator = pytest.mark.parametrize("estimator", ["systematic", "stratified", "multinomial"])
each_allocation = pytest.mark.parametrize("allocation", ["global", "tile"])


class Softmax(NamedTuple):
    """A softmax to draw from: log weights of the keys, which are visible, S, and a sink logit."""

    log_weight: torch.Tensor
    visible: torch.Tensor
    samples: int
    sink: float = -torch.inf

    @property
    def with_sink(self) -> torch.Tensor:
        """Probabilities of the keys and, last, of the sink."""
        log_weight = self.log_weight.masked_fill(~self.visible, -torch.inf)
        return torch.cat((log_weight, log_weight.new_tensor([self.sink]))).softmax(0)

    @property
    def p(self) -> torch.Tensor:
        return self.with_sink[:-1]

    def tiles(self, size: int) -> tuple[torch.Tensor, ...]:
        """Probabilities of each tile of keys, counted from the first visible key to the last."""
        seen = self.visible.nonzero()
        return self.p[seen[0] : seen[-1] + 1].split(size)


def _gaussian(length: int, spread: float) -> torch.Tensor:
    source = torch.Generator().manual_seed(length)
    return torch.randn(length, generator=source, dtype=torch.float64) * spread


def _softmax(name: str) -> Softmax:
    flat = torch.zeros(300, dtype=torch.float64)
    column = torch.arange(600)
    log_weight, visible, samples = {
        "normal": (_gaussian(300, 1.5), None, 32),
        "peaked": (_gaussian(300, 6.0), None, 32),
        "more draws than keys": (_gaussian(130, 1.0), None, 200),
        "one draw": (_gaussian(300, 1.5), None, 1),
        # The first key, an attention sink, holds 0.9 of the mass.
        "sink": (torch.where(torch.arange(300) == 0, 0.9, 0.1 / 299).double().log(), None, 16),
        "flat": (flat, None, 24),
        # Tile masses that make S P_t an integer: 16 draws a tile; 4 tiles of 1/4 draw.
        "16 draws a tile": (torch.zeros(512, dtype=torch.float64), None, 64),
        "1 draw in 4 tiles": (torch.zeros(512, dtype=torch.float64), None, 1),
        # 1/8, 1/2, 1/8, 1/4 of the mass, so 2, 8, 2, 4 draws.
        "integer tiles": (
            torch.tensor([1.0, 4.0, 1.0, 2.0], dtype=torch.float64).log().repeat_interleave(128),
            None,
            16,
        ),
        # exp(-2000) is zero in float64: whole tiles, first, between and last, hold no mass.
        "zero tiles": (
            torch.where((column % 256 < 140) | (column > 560), -2000.0, _gaussian(600, 1.0)),
            None,
            20,
        ),
        "hidden tiles": (_gaussian(600, 1.0), (column > 40) & ((column < 60) | (column > 330)), 20),
        "holes": (_gaussian(600, 1.0), (column % 3 != 0) & (column > 7) & (column < 431), 20),
        "last tile of one key": (_gaussian(257, 1.5), None, 20),
        "sink logit": (_gaussian(300, 1.5), None, 20),
        "heavy sink logit": (_gaussian(300, 1.5), None, 20),
    }[name]
    if visible is None:
        visible = torch.ones(len(log_weight), dtype=torch.bool)
    # Half of the mass, and all but a thousandth.
    logit = {"sink logit": 0.0, "heavy sink logit": 7.0}.get(name, -torch.inf)
    return Softmax(log_weight, visible, samples, float(log_weight.logsumexp(0)) + logit)


SOFTMAXES = [
    "normal",
    "peaked",
    "more draws than keys",
    "one draw",
    "sink",
    "flat",
    "16 draws a tile",
    "1 draw in 4 tiles",
    "integer tiles",
    "zero tiles",
    "hidden tiles",
    "holes",
    "last tile of one key",
    "sink logit",
    "heavy sink logit",
]
each_softmax = pytest.mark.parametrize("name", SOFTMAXES)


def drawn(
    softmax: Softmax,
    estimator: str,
    allocation: Any,
    replicates: int,
    seed: int | torch.Tensor = 0,
    dtype: torch.dtype = torch.float64,
) -> reference.Draws:
    """Draws of one head, `replicates` rows that differ in nothing but their uniforms."""
    # With D = 1, query 1 and scaling 1, a key is its own score.
    query = torch.ones(replicates, 1, 1, 1, dtype=dtype)
    return reference.draw(
        query,
        softmax.log_weight.to(dtype).view(1, 1, -1, 1).expand(replicates, -1, -1, -1),
        samples=softmax.samples,
        estimator=estimator,
        scaling=1.0,
        mask=softmax.visible.view(1, 1, 1, -1),
        seed=seed,
        layer=0,
        position=torch.zeros(replicates, dtype=torch.int64),
        allocation=allocation,
        sinks=None
        if softmax.sink == -torch.inf
        else torch.tensor([softmax.sink], dtype=torch.float64),
    )


def share(draws: reference.Draws, length: int) -> torch.Tensor:
    """Total weight of each key: float64 (replicates, N), an estimate of p."""
    weight = draws.weight.expand_as(draws.index)
    return weight.new_zeros(len(weight), length).scatter_add_(
        1, draws.index[:, 0, 0], weight[:, 0, 0]
    )


def with_uniforms(
    monkeypatch: pytest.MonkeyPatch, grid: torch.Tensor, inside: torch.Tensor
) -> None:
    """Row r draws by the uniform grid[r] over the row, and inside[r] in every other place."""

    def chosen(*arguments: Any) -> torch.Tensor:
        *_, stream = arguments
        return (grid if stream == Stream.GRID else inside).view(-1, 1, 1, 1)

    monkeypatch.setattr(reference, "uniform", chosen)


def intervals(breakpoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of the integral of a step function with the given breakpoints modulo 1.

    Each piece is taken at both of its ends, 1e-10 inside, with half its length: a breakpoint that
    is elsewhere in the reference changes one of the two.
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    cuts = torch.cat((breakpoints.frac(), ends)).sort().values
    length = cuts.diff()
    inset = (length / 2).clamp(max=1e-10)
    nodes = torch.cat((cuts[:-1] + inset, cuts[1:] - inset))
    weight = torch.cat((length, length)) / 2
    return nodes[weight > 0], weight[weight > 0]


def expected_share(
    monkeypatch: pytest.MonkeyPatch, softmax: Softmax, estimator: str, allocation: str
) -> torch.Tensor:
    """The expectation of `share`, exactly: a sum over the pieces on which the draws are constant.

    Each draw depends on one uniform, or on the two of (row, tile), and expectation is linear, so
    draws may share the uniform that is integrated over, whatever their joint law.
    """
    length, samples = len(softmax.p), softmax.samples
    tiles = softmax.tiles(TILE if allocation == "global" else FIXED_TILE)
    draws = samples if allocation == "global" else -(-samples // len(tiles))

    def step(grid: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        with_uniforms(monkeypatch, grid, inside)
        return share(drawn(softmax, estimator, allocation, len(grid)), length)

    def inside_breaks(budget: list[float]) -> torch.Tensor:
        """Where (j + u) / n passes a key's cumulative mass: u = frac(n F_i), in every tile."""
        return torch.cat(
            [n * t.cumsum(0) / t.sum() for n, t in zip(budget, tiles, strict=True) if t.sum() > 0]
        )

    if allocation == "tile" or estimator != "systematic":
        if allocation == "tile":
            breaks = inside_breaks([1.0 if estimator == "multinomial" else draws] * len(tiles))
        else:
            breaks = softmax.p.cumsum(0) * (1 if estimator == "multinomial" else samples)
        u, weight = intervals(breaks)
        return weight @ step(u, u)
    # The budgets n_t of the tiles are constant between the breakpoints S P_t of the grid's offset.
    masses = torch.stack([t.sum() for t in tiles])
    outer, outer_weight = intervals(masses.cumsum(0) * samples)
    first = int(softmax.visible.nonzero()[0])
    by_key = step(outer, torch.full_like(outer, 0.5)) * samples
    grid, inside, weight = [], [], []
    for u, w, row in zip(outer, outer_weight, by_key, strict=True):
        budget = [float(t.sum().round()) for t in row[first:].split(TILE)][: len(tiles)]
        v, inner_weight = intervals(inside_breaks(budget))
        grid.append(u.expand_as(v))
        inside.append(v)
        weight.append(w * inner_weight)
    return torch.cat(weight) @ step(torch.cat(grid), torch.cat(inside))


def assert_unbiased(expected: torch.Tensor, softmax: Softmax) -> None:
    """Expected shares are p, up to the rounding of the breakpoints (16 roundings of S F_i each)."""
    floor = 16 * unit_roundoff(torch.float64) * len(softmax.p) * max(softmax.samples, 1)
    error = (expected - softmax.p).abs().max().item()
    assert error <= floor, f"expected share of a key is off by {error:.2e}"


@each_softmax
@each_allocation
@each_estimator
def test_the_expectation_is_exact(
    monkeypatch: pytest.MonkeyPatch, estimator: str, allocation: str, name: str
) -> None:
    softmax = _softmax(name)
    assert_unbiased(expected_share(monkeypatch, softmax, estimator, allocation), softmax)


def largest_remainder(masses: torch.Tensor, samples: int) -> torch.Tensor:
    """Tile budgets of the published kernel: floors of S P_t, the rest to the largest remainders."""
    budget = (masses * samples).floor()
    rest = int(samples - budget.sum())
    budget[(masses * samples - budget).argsort(descending=True, stable=True)[:rest]] += 1
    return budget


def _deterministic_share(softmax: Softmax) -> torch.Tensor:
    """Expected shares when the budgets of the tiles are rounded deterministically."""
    tiles = softmax.tiles(TILE)
    budget = largest_remainder(torch.stack([t.sum() for t in tiles]), softmax.samples)
    inside = [n * t / t.sum() / softmax.samples for n, t in zip(budget, tiles, strict=True)]
    return torch.cat(inside)


@pytest.mark.parametrize("name", ["normal", "sink", "flat", "one draw", "1 draw in 4 tiles"])
def test_the_exact_test_catches_deterministic_budgets(name: str) -> None:
    softmax = _softmax(name)
    expected = _deterministic_share(softmax)
    assert expected.sum() == pytest.approx(1.0)  # S draws, only not where they should be
    with pytest.raises(AssertionError, match="expected share of a key is off"):
        assert_unbiased(expected, softmax)


def test_the_exact_test_passes_deterministic_budgets_only_where_they_are_exact() -> None:
    for name in ("16 draws a tile", "integer tiles"):
        assert_unbiased(_deterministic_share(_softmax(name)), _softmax(name))


def _long(name: str) -> torch.Tensor:
    log_weight = {
        "flat": torch.zeros(10_000, dtype=torch.float64),
        "normal": _gaussian(10_000, 1.0),
        "sink": torch.where(torch.arange(10_000) == 0, 0.9, 0.1 / 9_999).double().log(),
    }[name]
    return log_weight.to(torch.bfloat16).double()  # exact in every dtype below


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["flat", "normal", "sink"])
def test_long_contexts_over_a_grid_of_uniforms(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """10k keys: of M equally spaced offsets, n points per unit hit [a, b) within 1/M on average."""
    softmax = Softmax(_long(name), torch.ones(10_000, dtype=torch.bool), 128)
    scores = softmax.log_weight
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    budget = score_budget(one, scores.view(1, 1, -1, 1), 1.0).flatten()
    tiles = softmax.tiles(TILE)
    mass = torch.stack([t.sum() for t in tiles])
    rounding = 128 * softmax_budget(scores, budget, TILE, torch.float32)

    # The offset of the grid: mean budgets of the tiles are S P_t.
    m = 101
    u = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    with_uniforms(monkeypatch, u, torch.full_like(u, 0.3))
    counts = share(drawn(softmax, "systematic", "global", m, dtype=dtype), 10_000) * 128
    by_tile = torch.stack([t.sum(1) for t in counts.split(TILE, 1)], 1)
    assert ((by_tile.mean(0) - 128 * mass).abs() <= 1 / m + rounding).all()
    assert ((by_tile - 128 * mass).abs() < 1 + rounding).all()

    # The offset inside the tiles, for given budgets n_t: mean counts are n_t p_i / P_t.
    m = 400
    v = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    for offset in (0.17, 0.71):
        with_uniforms(monkeypatch, torch.full_like(v, offset), v)
        counts = share(drawn(softmax, "systematic", "global", m, dtype=dtype), 10_000) * 128
        for t, (block, p) in enumerate(zip(counts.split(TILE, 1), tiles, strict=True)):
            n = block[0].sum().round()
            keys = slice(t * TILE, t * TILE + len(p))
            inside = softmax_budget(scores[keys], budget[keys], TILE, torch.float32)
            assert (block.sum(1) == n).all()
            assert ((block.mean(0) - n * p / p.sum()).abs() <= 1 / m + n * inside).all()


# Over fixed seeds, with the uniforms of the counter RNG.

REPLICATES = 3000


def seeds(replicates: int = REPLICATES) -> torch.Tensor:
    return torch.arange(replicates) * 1_000_003 + 17


def variance_of(p: torch.Tensor, x: torch.Tensor, draws: int, estimator: str) -> torch.Tensor:
    """Variance of the mean of x over `draws` draws from p: x (K, N) -> (K,).

    Multinomial: Var_p(x) / S. Stratified: sum_k Var(x | stratum k) / S^2, where the moments of a
    stratum are differences of the integrals of x and x^2 over the cumulative mass.
    """
    p = p / p.sum()
    if estimator == "multinomial":
        return (x**2 @ p - (x @ p) ** 2) / draws
    cdf = torch.cat((p.new_zeros(1), p.cumsum(0) / p.sum()))
    ends = torch.arange(draws + 1, dtype=torch.float64) / draws
    row = torch.searchsorted(cdf[1:].contiguous(), ends, right=True).clamp(max=len(p) - 1)

    def integral(y: torch.Tensor) -> torch.Tensor:
        whole = torch.cat((y.new_zeros(len(y), 1), (y * p).cumsum(1)), 1)
        return whole[:, row] + y[:, row] * (ends - cdf[row])

    mean, square = (integral(y).diff() * draws for y in (x, x**2))
    return (square - mean**2).clamp(min=0).sum(1) / draws**2


def analytic_variance(
    softmax: Softmax, x: torch.Tensor, estimator: str, allocation: str
) -> torch.Tensor:
    """Variance of sum_i share_i x_i; with a fixed budget per tile, sum_t P_t^2 Var_t."""
    if allocation == "global":
        # A draw of the sink contributes zero.
        return variance_of(softmax.with_sink, pad(x, (0, 1)), softmax.samples, estimator)
    tiles, seen = softmax.tiles(FIXED_TILE), softmax.visible.nonzero()
    x = x[:, seen[0] : seen[-1] + 1]
    draws = -(-softmax.samples // len(tiles))
    parts = [
        t.sum() ** 2 * variance_of(t, y, draws, estimator)
        for t, y in zip(tiles, x.split(FIXED_TILE, 1), strict=True)
        if t.sum() > 0
    ]
    return torch.stack(parts).sum(0)


def directions(length: int, random: int = 2) -> torch.Tensor:
    """Value columns (K, N): random ones, a ramp and the parity of the tile.

    The ramp shows a distribution of uniforms that leans to one side, the parity a budget per tile
    that is off, where a random direction would drown either in noise. Columns share their draws,
    which a union bound allows.
    """
    source = torch.Generator().manual_seed(length + 1)
    x = torch.randn(random, length, generator=source, dtype=torch.float64)
    key = torch.arange(length, dtype=torch.float64)
    return torch.cat((x, (key / length)[None], (key // TILE % 2)[None]))


def over_seeds(
    softmax: Softmax, estimator: str, allocation: str, replicates: int = REPLICATES
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates (R, K) along K directions, their exact mean (K,), and x (K, N)."""
    x = directions(len(softmax.p))
    draws = drawn(softmax, estimator, allocation, replicates, seeds(replicates))
    return share(draws, len(softmax.p)) @ x.T, x @ softmax.p, x


@each_softmax
@each_allocation
@pytest.mark.parametrize("estimator", ["stratified", "multinomial"])
def test_mean_and_variance_over_seeds_are_the_analytic_ones(
    estimator: str, allocation: str, name: str
) -> None:
    softmax = _softmax(name)
    estimates, exact, x = over_seeds(softmax, estimator, allocation)
    variance = analytic_variance(softmax, x, estimator, allocation)
    floor = 1e-12 * x.abs().max()
    assert_mean(estimates, exact, variance, floor)
    # Draws that were not independent would keep the mean and miss the variance.
    squares = (estimates - exact) ** 2
    assert_mean(squares, variance, squares.var(0), floor)


@each_softmax
@each_allocation
def test_systematic_mean_over_seeds(allocation: str, name: str) -> None:
    """Its variance has no closed form: the measured one, and the exact test above, stand in."""
    softmax = _softmax(name)
    estimates, exact, x = over_seeds(softmax, "systematic", allocation)
    assert_mean(estimates, exact, estimates.var(0), 1e-12 * x.abs().max())


def test_multinomial_counts_are_multinomial() -> None:
    softmax = _softmax("normal")
    draws = drawn(softmax, "multinomial", "global", 2 * REPLICATES, seeds(2 * REPLICATES))
    counts = draws.counts(300).sum((0, 1, 2)).double()
    expected = softmax.p * 2 * REPLICATES * softmax.samples
    assert expected.min() > 1
    assert_chi_square(counts, expected)


@pytest.mark.parametrize("estimator", ["stratified", "multinomial", "systematic"])
def test_flat_softmax_over_ten_thousand_keys(estimator: str) -> None:
    softmax = Softmax(torch.zeros(10_000).double(), torch.ones(10_000, dtype=torch.bool), 128)
    estimates, exact, x = over_seeds(softmax, estimator, "global", 400)
    variance = (
        estimates.var(0)
        if estimator == "systematic"
        else analytic_variance(softmax, x, estimator, "global")
    )
    assert_mean(estimates, exact, variance, 1e-12)


def test_heads_layers_and_positions_are_independent_replicates() -> None:
    """Averaging over heads, layers or steps must average the noise: draws shared between them bias
    every such mean alike, which tests over seeds cannot see."""
    log_weight = _gaussian(200, 1.0)
    x = directions(200)
    p = log_weight.softmax(0)
    variance = variance_of(p, x, 16, "multinomial")
    given: dict[str, Any] = {
        "samples": 16,
        "estimator": "multinomial",
        "scaling": 1.0,
        "mask": None,
        "seed": 3,
    }
    heads = 1500
    query = torch.ones(1, heads, 1, 1, dtype=torch.float64)
    key = log_weight.view(1, 1, -1, 1)
    by_head = reference.draw(query, key, layer=0, position=None, **given).counts(200)[0, 0]
    steps = torch.arange(heads)
    rows = query[:, :1].expand(heads, -1, -1, -1), key.expand(heads, -1, -1, -1)
    by_step = reference.draw(*rows, layer=0, position=steps, **given).counts(200)[:, 0, 0]
    by_layer = torch.cat(
        [
            reference.draw(query[:, :1], key, layer=i, position=None, **given).counts(200)[0, 0]
            for i in range(300)
        ]
    )
    for counts in (by_head, by_step, by_layer):
        assert_mean(counts.double() @ x.T / 16, x @ p, variance, 1e-12)
        squares = (counts.double() @ x.T / 16 - x @ p) ** 2
        assert_mean(squares, variance, squares.var(0), 1e-12)


@pytest.mark.parametrize("name", ["normal", "flat"])
def test_the_test_over_seeds_catches_deterministic_budgets(name: str) -> None:
    softmax = _softmax(name)
    tiles = softmax.tiles(TILE)
    budget = largest_remainder(torch.stack([t.sum() for t in tiles]), softmax.samples)
    x = directions(len(softmax.p))
    offsets = torch.rand(REPLICATES, len(tiles), 1, dtype=torch.float64)
    estimates = torch.zeros(REPLICATES, len(x), dtype=torch.float64)
    for t, (n, p, y) in enumerate(zip(budget, tiles, x.split(TILE, 1), strict=True)):
        points = (torch.arange(int(n)) + offsets[:, t]) / n
        rows = torch.searchsorted(p.cumsum(0) / p.sum(), points).clamp(max=len(p) - 1)
        estimates += y.T[rows].sum(1) / softmax.samples
    with pytest.raises(AssertionError, match="mean is off"):
        assert_mean(estimates, x @ softmax.p, estimates.var(0), 1e-12)


SABOTAGE: dict[str, Callable[..., torch.Tensor]] = {
    "skewed uniforms": lambda uniform, *a: uniform(*a) ** 1.1,
    "uniforms short of one": lambda uniform, *a: uniform(*a) * 0.97,
    "one uniform for grid and tiles": lambda uniform, *a: uniform(
        *a[:4], torch.zeros(1, dtype=torch.int64), Stream.GRID
    ),
}


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_the_test_over_seeds_catches_bad_uniforms(
    monkeypatch: pytest.MonkeyPatch, sabotage: str
) -> None:
    uniform = reference.uniform
    monkeypatch.setattr(reference, "uniform", lambda *a: SABOTAGE[sabotage](uniform, *a))
    failed = 0
    for estimator in ("multinomial", "systematic"):
        estimates, exact, x = over_seeds(_softmax("normal"), estimator, "global")
        try:
            assert_mean(estimates, exact, estimates.var(0), 1e-12 * x.abs().max())
        except AssertionError:
            failed += 1
    assert failed


# The size of the error.


@each_softmax
def test_stratified_variance_is_at_most_multinomial(name: str) -> None:
    """A theorem: conditioning on the stratum removes the variance between strata."""
    softmax = _softmax(name)
    x = directions(len(softmax.p), 64)
    stratified, multinomial = (
        analytic_variance(softmax, x, e, "global") for e in ("stratified", "multinomial")
    )
    rounding = 1e-15 * x.square().amax(1)  # of a direction in which every key has the same value
    assert (stratified <= multinomial * (1 + 1e-9) + rounding).all()


@pytest.mark.parametrize("name", ["normal", "peaked", "sink", "flat", "holes", "zero tiles"])
def test_systematic_variance_is_at_most_multinomial_on_random_values(name: str) -> None:
    """A measurement: mean over the directions, whose own error is a few per cent."""
    softmax = _softmax(name)
    estimates, exact, x = over_seeds(softmax, "systematic", "global")
    multinomial = analytic_variance(softmax, x, "multinomial", "global").mean()
    assert ((estimates - exact) ** 2).mean() <= 1.05 * multinomial


@pytest.mark.parametrize(("length", "samples"), [(4096, 32), (8192, 256)])
def test_periodic_values_do_not_resonate_across_tiles(length: int, samples: int) -> None:
    """Values of period n/S and a flat softmax: a single grid lands on one phase in all its draws.

    Its variance is then that of one draw, S times multinomial. With an offset per tile only the n_t
    draws of one tile share a phase, so the factor is n_t: 1 and 4 here, whatever the context.
    """
    period, per_tile = length // samples, samples * TILE // length
    x = directions(period)[:1].repeat(1, length // period)
    softmax = Softmax(torch.zeros(length).double(), torch.ones(length, dtype=torch.bool), samples)
    multinomial = variance_of(softmax.p, x, samples, "multinomial").item()

    u = torch.rand(2000, 1, dtype=torch.float64)
    one_grid = x[0][((torch.arange(samples) + u) / samples * length).long()].mean(1)
    assert one_grid.var().item() > 0.8 * samples * multinomial

    draws = drawn(softmax, "systematic", "global", 1000, seeds(1000))
    ours = (share(draws, length) @ x.T).var().item()
    # 1000 replicates give a variance within 5 standard errors of sqrt(2/1000) each.
    assert ours == pytest.approx(per_tile * multinomial, rel=5 * (2 / 1000) ** 0.5)


@each_estimator
def test_error_falls_as_the_square_root_of_the_budget(estimator: str) -> None:
    budgets = torch.tensor([4, 16, 64, 256])
    log_weight, visible = _gaussian(1000, 1.0), torch.ones(1000, dtype=torch.bool)
    rms = []
    for samples in budgets.tolist():
        softmax = Softmax(log_weight, visible, samples)
        estimates, exact, _ = over_seeds(softmax, estimator, "global", 700)
        rms.append(((estimates - exact) ** 2).mean().sqrt().log())
    size = budgets.double().log()
    size -= size.mean()
    slope = (size @ torch.stack(rms) / (size @ size)).item()
    # An rms over 700 replicates is known to 1/sqrt(1400); 5 such errors over the range of log S.
    margin = 5 / 1400**0.5 / float(size.norm())
    assert slope <= -0.5 + margin
    if estimator == "multinomial":
        assert slope >= -0.5 - margin
