"""The PyTorch reference against its definition, written again as loops over one head in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rng import uniform_in_integers
from tolerance import (
    attention,
    attention_budget,
    average_budget,
    gamma,
    score_budget,
    softmax_budget,
    working_dtype,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from santa_hf import reference
from santa_hf.rng import Stream

ESTIMATORS = ("systematic", "stratified", "multinomial")
ALLOCATIONS = ("global", "tile")
LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float32)

each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
each_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)


def case(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.5,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query, key and value; the scores have a standard deviation of `spread`."""
    source = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, *shape, generator=source, dtype=torch.float64)
        for shape in ((heads, 1, dim), (kv_heads, length, dim), (kv_heads, length, value_dim))
    )
    return (query * spread).to(dtype), key.to(dtype), value.to(dtype)


def arguments(query: torch.Tensor, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "samples": 40,
        "estimator": "systematic",
        "scaling": query.shape[-1] ** -0.5,
        "mask": None,
        "seed": 5,
        "layer": 3,
        "position": None,
    }
    return {**values, **changes}


def counts(query: torch.Tensor, key: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Draws of each key: int64 (B, H, N)."""
    drawn = reference.draw(query, key, **arguments(query, **changes))
    return drawn.counts(key.shape[2]).flatten(1, 2)


def one_head(
    scores: np.ndarray,
    samples: int,
    estimator: str,
    allocation: str,
    uniforms: Callable[[Stream, int], float],
    sink: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws and total weight of each key of one head, by definition; scores -inf where masked.

    The sink, a logit or -inf, is one more key after the last, in a tile of its own; what is drawn
    there adds nothing.
    """
    visible = np.flatnonzero(scores > -np.inf)
    number, weight = np.zeros(len(scores), dtype=int), np.zeros(len(scores))
    if not len(visible):
        return number, weight
    first, last = visible[0], visible[-1]
    p = np.exp(np.append(scores, sink) - max(scores.max(), sink))
    p /= p.sum()
    p, p_sink = p[:-1], p[-1]

    def invert(mass: np.ndarray, fraction: float) -> int:
        """First key whose cumulative mass exceeds the fraction of the whole."""
        return int(np.searchsorted(np.cumsum(mass) / mass.sum(), fraction, side="right"))

    def points(stream: Stream, draws: int, base: int = 0) -> list[float]:
        if estimator == "multinomial":
            return [uniforms(stream, base + k) for k in range(draws)]
        return [(k + uniforms(stream, base + k)) / draws for k in range(draws)]

    size = reference.TILE if allocation == "global" else reference.FIXED_TILE
    tiles = [(start, p[start : start + size]) for start in range(first, last + 1, size)]
    if allocation == "tile":
        draws = math.ceil(samples / len(tiles))
        for t, (start, mass) in enumerate(tiles):
            if mass.sum() == 0:
                continue
            if estimator == "systematic":
                inside = [(j + uniforms(Stream.FIXED_TILE, t)) / draws for j in range(draws)]
            else:
                inside = points(Stream.FIXED_SAMPLE, draws, t * draws)
            for point in inside:
                number[start + invert(mass, point)] += 1
                weight[start + invert(mass, point)] += mass.sum() / draws
        return number, weight
    if estimator == "systematic":
        offset = uniforms(Stream.GRID, 0)
        chosen = [
            invert(np.array([*(m.sum() for _, m in tiles), p_sink]), (k + offset) / samples)
            for k in range(samples)
        ]
        drawn = []
        for t in sorted(set(chosen) - {len(tiles)}):
            start, mass = tiles[t]
            n = chosen.count(t)
            drawn += [start + invert(mass, (j + uniforms(Stream.TILE, t)) / n) for j in range(n)]
    else:
        drawn = [invert(np.append(p, p_sink), x) for x in points(Stream.SAMPLE, samples)]
        drawn = [i for i in drawn if i < len(p)]
    np.add.at(number, drawn, 1)
    return number, number / samples


def brute_force(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    samples: int,
    estimator: str,
    scaling: float,
    mask: torch.Tensor | None,
    seed: int | torch.Tensor,
    layer: int,
    position: torch.Tensor | None,
    head_offset: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    allocation: str = "global",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws (B, H, N) and outputs (B, H, 1, Dv), one head at a time."""
    batch, heads = query.shape[:2]
    group, length = heads // key.shape[1], key.shape[2]
    number = torch.zeros(batch, heads, length, dtype=torch.int64)
    out = torch.zeros(batch, heads, 1, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        visible = np.ones(length, dtype=bool)
        if mask is not None:
            visible = mask.expand(batch, 1, 1, length)[b, 0, 0].numpy()
        at = int(np.flatnonzero(visible)[-1]) if visible.any() else 0
        if position is not None:
            at = int(position[b])
        row_seed = int(seed[b]) if isinstance(seed, torch.Tensor) else seed
        for h in range(heads):
            keys, values = key[b, h // group].numpy(), value[b, h // group].numpy()
            scores = keys @ query[b, h, 0].numpy() * scaling
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            scores = np.where(visible, scores, -np.inf)
            sink = -math.inf if sinks is None else float(sinks[h])

            def uniforms(stream: Stream, index: int, at=at, h=h, row_seed=row_seed) -> float:
                return uniform_in_integers(row_seed, layer, head_offset + h, at, index, stream)

            n, weight = one_head(scores, samples, estimator, allocation, uniforms, sink)
            number[b, h] = torch.from_numpy(n)
            out[b, h, 0] = torch.from_numpy(weight @ values)
    return number, out


def assert_equals_brute_force(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **changes: Any
) -> None:
    given = arguments(query, **changes)
    number, out = brute_force(query, key, value, **given)
    assert torch.equal(counts(query, key, **changes), number)
    got = reference.decode(query, key, value, **given)
    assert got.dtype == query.dtype
    torch.testing.assert_close(got, out, rtol=1e-11, atol=1e-12)


# (B, H, KVH, N, D, Dv): group ratios 1, 3, 5, 7, 8 and 2; Dv below, equal and above D.
SHAPES = [
    (2, 2, 2, 300, 16, 16),
    (1, 6, 2, 129, 8, 24),
    (1, 5, 1, 515, 16, 8),
    (1, 7, 1, 257, 4, 4),
    (1, 8, 1, 128, 12, 1),
    (2, 4, 2, 63, 1, 5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_allocation
@each_estimator
def test_equals_brute_force(estimator: str, allocation: Any, shape: tuple[int, ...]) -> None:
    tensors = case(*shape)
    position = torch.arange(shape[0]) * 1000 + 7
    assert_equals_brute_force(
        *tensors, estimator=estimator, allocation=allocation, position=position, head_offset=16
    )


def _mask(kind: str, batch: int, length: int) -> torch.Tensor:
    visible = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    column = torch.arange(length)
    if kind == "left padding":
        visible &= column >= torch.tensor([0, 131]).view(2, 1, 1, 1)
    elif kind == "holes":
        visible &= (column % 7 != 0) & (column % 5 != 1)
    elif kind == "hidden tiles":
        visible &= (column < 100) | (column >= 384)
        visible[1] = column >= 290
    elif kind == "static tail":
        visible &= column < torch.tensor([207, 208]).view(2, 1, 1, 1)
    elif kind == "padding and tail":
        visible &= (column >= torch.tensor([3, 150]).view(2, 1, 1, 1)) & (column < 400)
    elif kind == "broadcast":
        visible = (column % 3 != 0).view(1, 1, 1, length)
    elif kind == "expanded":
        visible = (column < 300).view(1, 1, 1, length).expand(batch, 1, 1, length)
    elif kind == "one visible key":
        visible = column == torch.tensor([217, 0]).view(2, 1, 1, 1)
    elif kind == "all masked":
        visible = torch.zeros_like(visible)
    elif kind == "one row all masked":
        visible[0] = False
        visible[1] &= column > 77
    return visible


MASKS = [
    "left padding",
    "holes",
    "hidden tiles",
    "static tail",
    "padding and tail",
    "broadcast",
    "expanded",
    "one visible key",
    "one row all masked",
]


@pytest.mark.parametrize("kind", MASKS)
@each_allocation
@each_estimator
def test_masks_equal_brute_force(estimator: str, allocation: Any, kind: str) -> None:
    query, key, value = case(2, 3, 1, 420, 8, 6)
    mask = _mask(kind, 2, 420)
    given = {"estimator": estimator, "allocation": allocation, "mask": mask}
    if kind == "one row all masked":
        # Which key a row without one "draws" says nothing; its output is checked as SDPA's below.
        query, key, value, given["mask"] = query[1:], key[1:], value[1:], mask[1:]
    assert_equals_brute_force(query, key, value, **given)


@pytest.mark.parametrize("samples", [1, 2, 3, 127, 128, 500])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 257])
@each_estimator
def test_budgets_equal_brute_force(estimator: str, length: int, samples: int) -> None:
    """N < S, N = 1, S = 1, and lengths about a tile."""
    query, key, value = case(1, 2, 1, length, 8, 4)
    for allocation in ALLOCATIONS if samples <= 3 else ("global",):
        given = {"estimator": estimator, "samples": samples, "allocation": allocation}
        assert_equals_brute_force(query, key, value, **given)


@settings(derandomize=True, deadline=None, database=None, max_examples=80)
@given(st.data())
def test_any_case_equals_brute_force(data: st.DataObject) -> None:
    batch, kv_heads, group = (data.draw(st.integers(1, n)) for n in (3, 2, 8))
    heads, length = kv_heads * group, data.draw(st.integers(1, 600))
    dim, value_dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 2**32))
    spread = data.draw(st.sampled_from([0.5, 2.0, 8.0]))
    query, key, value = case(
        batch, heads, kv_heads, length, dim, value_dim, spread=spread, seed=seed
    )
    source = torch.Generator().manual_seed(seed + 1)
    mask = None
    if data.draw(st.booleans()):
        rows = data.draw(st.sampled_from([1, batch]))
        density = data.draw(st.sampled_from([0.02, 0.7, 1.0]))
        mask = torch.rand(rows, 1, 1, length, generator=source) < density
        mask[..., : data.draw(st.integers(0, length - 1))] = False
        shown = torch.randint(length, (rows,), generator=source)
        mask[torch.arange(rows), 0, 0, shown] = True  # at least one key of each row
    words = st.lists(st.integers(0, 2**63 - 1), min_size=batch, max_size=batch)
    assert_equals_brute_force(
        query,
        key,
        value,
        mask=mask,
        samples=data.draw(st.sampled_from([1, 2, 9, 64])),
        estimator=data.draw(st.sampled_from(ESTIMATORS)),
        allocation=data.draw(st.sampled_from(ALLOCATIONS)),
        seed=data.draw(st.integers(0, 2**63 - 1) | words.map(torch.tensor)),
        layer=data.draw(st.integers(0, 2**24 - 1)),
        position=data.draw(st.none() | words.map(torch.tensor)),
        head_offset=data.draw(st.integers(0, 2**20)),
        softcap=data.draw(st.sampled_from([None, 3.0])),
        sinks=data.draw(st.sampled_from([None, torch.randn(heads, generator=source).double()])),
    )


@pytest.mark.parametrize("kind", [None, "left padding", "holes"])
@pytest.mark.parametrize("extra", ["softcap", "sinks", "both"])
@each_allocation
@each_estimator
def test_softcap_and_sinks_equal_brute_force(
    estimator: str, allocation: Any, extra: str, kind: str | None
) -> None:
    query, key, value = case(2, 6, 2, 420, 8, 6, spread=3.0)
    changes: dict[str, Any] = {"mask": None if kind is None else _mask(kind, 2, 420)}
    if extra != "sinks":
        changes["softcap"] = 2.5
    if extra != "softcap":
        # From no weight to nearly all of it: the scores reach about 10, their log-sum-exp 11.
        changes["sinks"] = torch.tensor([-math.inf, -5.0, 4.0, 8.0, 11.0, 30.0]).double()
    assert_equals_brute_force(
        query, key, value, estimator=estimator, allocation=allocation, **changes
    )


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [None, "left padding", "one row all masked"])
def test_dense_with_softcap_and_sinks(dtype: torch.dtype, kind: str | None) -> None:
    query, key, value = case(2, 6, 2, 420, 8, 6, dtype, spread=3.0)
    mask = None if kind is None else _mask(kind, 2, 420)
    sinks = torch.tensor([-math.inf, -5.0, 4.0, 8.0, 11.0, 30.0]).double()
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT * 8**-0.5
    scores = 2.5 * torch.tanh(scores / 2.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    p = torch.cat((scores, sinks.view(1, 6, 1, 1).expand(2, -1, 1, 1)), -1).softmax(-1)[..., :-1]
    exact = p.nan_to_num() @ value.double().repeat_interleave(3, 1)
    given = arguments(query, estimator="dense", mask=mask, softcap=2.5, sinks=sinks.to(dtype))
    out = reference.decode(query, key, value, **given)
    # The rounding of the scores moves the softmax, whose rows are then averaged and rounded.
    budget = score_budget(query.view(2, 2, 3, 8), key, 8**-0.5).amax(-1).view(2, 6, 1, 1)
    moved = 2 * torch.expm1(2 * budget + gamma(420 + 20, working_dtype(dtype)))
    allowed = moved * value.double().abs().max() + average_budget(
        p.nan_to_num().squeeze(2), value.double().repeat_interleave(3, 1), dtype
    ).unsqueeze(2)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 30.0])
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=str)
@each_estimator
def test_exactly_the_budget_is_drawn(estimator: str, dtype: torch.dtype, spread: float) -> None:
    query, key, _ = case(2, 4, 2, 333, 16, 1, dtype, spread)
    mask = _mask("left padding", 2, 333)
    for samples in (1, 7, 64, 1000):
        drawn = counts(query, key, estimator=estimator, samples=samples, mask=mask)
        assert (drawn.sum(-1) == samples).all()
        assert (drawn[~mask[:, 0].expand_as(drawn)] == 0).all()


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53])
@each_allocation
@each_estimator
def test_extreme_uniforms_draw_visible_keys_only(
    monkeypatch: pytest.MonkeyPatch, estimator: str, allocation: Any, extreme: float
) -> None:
    """The ends of [0, 1) with tiles of zero mass first, between and last."""
    monkeypatch.setattr(
        reference, "uniform", lambda *_: torch.full((1, 1, 1, 1), extreme, dtype=torch.float64)
    )
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.full((1, 1, 1100, 1), -2000.0, dtype=torch.float64)
    key[:, :, 300:500] = 0.0
    key[:, :, 700:900] = 0.5
    for samples in (1, 3, 128, 1 << 20):
        given = {"estimator": estimator, "allocation": allocation, "scaling": 1.0}
        drawn = counts(query, key, samples=samples, **given)[0, 0]
        assert (drawn[key[0, 0, :, 0] < 0] == 0).all()
        if allocation == "global":
            assert drawn.sum() == samples


@each_estimator
def test_one_hot_softmax_draws_one_key(estimator: str) -> None:
    query, key, value = case(1, 6, 2, 700, 8, 4, torch.float32)
    hot = torch.tensor([13, 640])
    key[0, torch.arange(2), hot] = 1000 * query.view(2, 3, 8).sum(1)
    query = key[0, torch.arange(2), hot].repeat_interleave(3, 0).view(1, 6, 1, 8)
    expected = torch.zeros(1, 6, 700, dtype=torch.int64)
    expected[0, torch.arange(6), hot.repeat_interleave(3)] = 128
    for allocation in ALLOCATIONS:
        given = {"samples": 128, "estimator": estimator, "allocation": allocation}
        out = reference.decode(query, key, value, **arguments(query, **given))
        row = value[0, torch.arange(2), hot].repeat_interleave(3, 0).view(1, 6, 1, 4)
        budget = average_budget(torch.ones(1, dtype=torch.float64), row, torch.float32)
        assert ((out - row).abs() <= 128 * budget).all()
    drawn = counts(query, key, samples=128, estimator=estimator)
    assert torch.equal(drawn, expected)


@each_allocation
@each_estimator
def test_padding_and_unfilled_slots_change_nothing(estimator: str, allocation: Any) -> None:
    """The same keys alone, after padding, before unfilled slots, and beside longer rows."""
    query, key, value = case(1, 4, 2, 300, 8, 4)
    position = torch.tensor([299])
    given = {"estimator": estimator, "allocation": allocation}
    alone = counts(query, key, position=position, **given)
    out = reference.decode(query, key, value, **arguments(query, position=position, **given))
    for before, after in ((0, 212), (37, 0), (128, 100), (211, 1)):
        length = before + 300 + after
        other = case(2, 4, 2, length, 8, 4, seed=9)
        wide_query, wide_key, wide_value = other
        wide_query[1], mask = query[0], torch.ones(2, 1, 1, length, dtype=torch.bool)
        wide_key[1, :, before : before + 300] = key[0]
        wide_value[1, :, before : before + 300] = value[0]
        mask[1, ..., :before] = mask[1, ..., before + 300 :] = False
        at = {"position": torch.tensor([length - 1, 299]), "mask": mask}
        padded = counts(wide_query, wide_key, **at, **given)
        assert torch.equal(padded[1:, :, before : before + 300], alone)
        result = reference.decode(
            wide_query, wide_key, wide_value, **arguments(query, **at, **given)
        )
        torch.testing.assert_close(result[1:], out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@each_estimator
def test_strided_caches_equal_contiguous(estimator: str, dtype: torch.dtype) -> None:
    query, key, value = case(2, 6, 2, 2300, 16, 8, dtype)
    given = arguments(query, estimator=estimator)
    expected = reference.decode(query, key, value, **given)
    drawn = counts(query, key, estimator=estimator)

    def transposed(cache: torch.Tensor) -> torch.Tensor:
        return cache.transpose(1, 2).contiguous().transpose(1, 2)

    def with_head_room(cache: torch.Tensor) -> torch.Tensor:
        room = cache.new_full((2, 2, 4096, cache.shape[3]), torch.nan)
        room[:, :, :2300] = cache
        return room[:, :, :2300]

    def inside_a_wider_row(cache: torch.Tensor) -> torch.Tensor:
        return torch.cat((cache, torch.full_like(cache, torch.nan)), -1)[..., : cache.shape[-1]]

    for view in (transposed, with_head_room, inside_a_wider_row):
        strided = view(key), view(value)
        assert not strided[0].is_contiguous()
        assert torch.equal(counts(query, strided[0], estimator=estimator), drawn), view.__name__
        got = reference.decode(query, *strided, **given)
        if dtype == torch.bfloat16:  # blocks are widened into one buffer: bitwise
            assert torch.equal(got, expected), view.__name__
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # Transposed queries, as projections give them.
    wide = query.expand(2, 6, 3, 16).transpose(1, 2).contiguous().transpose(1, 2)[:, :, 1:2]
    assert torch.equal(reference.decode(wide, key, value, **given), expected)


@each_estimator
def test_rows_expanded_from_one_cache(estimator: str) -> None:
    query, key, value = case(1, 4, 2, 200, 8, 4)
    given = arguments(query, estimator=estimator)
    many = [t.expand(3, -1, -1, -1) for t in (query, key, value)]
    out = reference.decode(*many, **given)
    assert torch.equal(out[0], out[1])
    torch.testing.assert_close(out[:1], reference.decode(query, key, value, **given))


@each_estimator
def test_position_defaults_to_the_last_visible_index(estimator: str) -> None:
    query, key, _ = case(2, 4, 2, 420, 8, 4, spread=0.1)
    for kind, last in (("left padding", [419, 419]), ("static tail", [206, 207])):
        mask = _mask(kind, 2, 420)
        given = {"mask": mask, "estimator": estimator}
        default = counts(query, key, **given)
        assert torch.equal(default, counts(query, key, position=torch.tensor(last), **given))
        assert not torch.equal(default, counts(query, key, position=torch.tensor([5, 6]), **given))
    # Beyond 2**31, where a 32-bit signed position would wrap or raise.
    far = torch.tensor([2**31 + 3, 2**31 + 4])
    assert not torch.equal(
        counts(query, key, position=far, estimator=estimator),
        counts(query, key, position=far + 1, estimator=estimator),
    )


@each_allocation
@each_estimator
def test_head_offset_equals_a_slice_of_the_layer(estimator: str, allocation: Any) -> None:
    query, key, value = case(2, 12, 4, 300, 8, 4)
    given = {"estimator": estimator, "allocation": allocation}
    whole = counts(query, key, **given)
    out = reference.decode(query, key, value, **arguments(query, **given))
    for rank in range(2):
        heads, kv = slice(6 * rank, 6 * rank + 6), slice(2 * rank, 2 * rank + 2)
        shard = (query[:, heads], key[:, kv], value[:, kv])
        assert torch.equal(counts(*shard[:2], head_offset=6 * rank, **given), whole[:, heads])
        part = reference.decode(*shard, **arguments(query, head_offset=6 * rank, **given))
        torch.testing.assert_close(part, out[:, heads], rtol=1e-12, atol=1e-13)


@each_allocation
@each_estimator
def test_no_two_coordinates_share_draws(estimator: str, allocation: Any) -> None:
    """One query and one flat softmax everywhere: only the coordinates tell the draws apart."""
    query = torch.zeros(2, 8, 1, 4, dtype=torch.float64)
    key = torch.zeros(2, 2, 2000, 4, dtype=torch.float64)
    given = {"estimator": estimator, "allocation": allocation, "samples": 64}
    base = {"layer": 0, "seed": 1, "position": torch.tensor([1999, 1999])}
    drawn = counts(query, key, **given, **base)
    assert torch.equal(drawn[0], drawn[1])  # rows at one position share their draws, by contract
    everywhere = [drawn[0]]
    for change in (
        {"layer": 1},
        {"layer": 31},
        {"seed": 2},
        {"seed": 1 << 32},
        {"position": torch.tensor([2000, 2000])},
        {"head_offset": 8},
    ):
        everywhere.append(counts(query, key, **given, **{**base, **change})[0])
    assert len(torch.cat(everywhere).unique(dim=0)) == 8 * len(everywhere)
    by_row = counts(query, key, **given, **{**base, "seed": torch.tensor([2, 1])})
    assert torch.equal(by_row[0], everywhere[3])
    assert torch.equal(by_row[1], drawn[0])


def test_torch_generator_is_not_touched() -> None:
    query, key, value = case(1, 4, 2, 300, 8, 4)
    before = torch.get_rng_state()
    outputs = []
    for estimator in ESTIMATORS:
        for allocation in ALLOCATIONS:
            given = arguments(query, estimator=estimator, allocation=allocation)
            outputs.append(reference.decode(query, key, value, **given))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    again = reference.decode(query, key, value, **arguments(query))
    assert torch.equal(again, outputs[0])


@pytest.mark.parametrize("samples", [4, 400])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "dense"])
def test_rows_without_a_visible_key_are_zero_as_in_sdpa(estimator: str, samples: int) -> None:
    query, key, value = case(2, 4, 2, 420, 8, 4)
    for kind in ("all masked", "one row all masked"):
        mask = _mask(kind, 2, 420)
        expected = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
        for allocation in ALLOCATIONS:
            given = {"estimator": estimator, "samples": samples, "allocation": allocation}
            out = reference.decode(query, key, value, **arguments(query, mask=mask, **given))
            assert (expected[0] == 0).all()
            assert (out[0] == 0).all()
            assert out.isfinite().all()
            assert bool((out[1] != 0).any()) == (kind == "one row all masked")


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "dense"])
def test_a_sink_above_every_score_leaves_zero(estimator: str) -> None:
    """Also where exp(sink - score) overflows float64, and where the sink is all there is."""
    query, key, value = case(2, 4, 2, 420, 8, 4)
    sinks = torch.tensor([5000.0, 1000.0, 800.0, 100.0])
    for allocation in ALLOCATIONS:
        for mask in (None, _mask("one row all masked", 2, 420)):
            given = {"estimator": estimator, "allocation": allocation, "mask": mask}
            out = reference.decode(query, key, value, **arguments(query, sinks=sinks, **given))
            assert out.abs().max() < 1e-30
    mask = _mask("one row all masked", 2, 420)
    out = reference.decode(query, key, value, **arguments(query, sinks=sinks - 5000, mask=mask))
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("samples", [4, 400])
@each_allocation
@each_estimator
def test_nan_scores_give_nan_as_in_sdpa(
    estimator: str, allocation: Any, samples: int, bad: float
) -> None:
    given = {"estimator": estimator, "samples": samples, "allocation": allocation}
    query, key, value = case(2, 4, 2, 420, 8, 4)
    query[0, 1, 0, 3] = bad
    out = reference.decode(query, key, value, **arguments(query, **given))
    sdpa = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.equal(out.isnan(), sdpa.isnan())
    assert out[0, 1].isnan().all()
    assert out.isnan().sum() == 4

    query, key, value = case(2, 4, 2, 420, 8, 4)
    query = query.abs()
    key[1, 0, 400, 2] = bad
    out = reference.decode(query, key, value, **arguments(query, **given))
    sdpa = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.equal(out.isnan(), sdpa.isnan())
    assert out[1, :2].isnan().all()
    assert out.isnan().sum() == 8

    clean = key.nan_to_num(0.0, 0.0)
    column = torch.arange(420).view(1, 1, 1, 420)
    # Draws do not see a masked key at all; SDPA adds -inf to its score, and NaN stays NaN.
    for mask in (column < 400, column != 400):
        out = reference.decode(query, key, value, **arguments(query, mask=mask, **given))
        expected = reference.decode(query, clean, value, **arguments(query, mask=mask, **given))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("length", [5, 2047, 2048, 2049, 4096, 4100])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_scores_are_float32(dtype: torch.dtype, length: int) -> None:
    """Each score within the budget of a float32 dot product, which 16-bit arithmetic exceeds."""
    query, key, _ = case(2, 6, 2, length, 64, 1, dtype, spread=4.0)
    grouped = query.view(2, 2, 3, 64)
    exact = grouped.double() @ key.double().transpose(-1, -2) * 0.125
    budget = score_budget(grouped, key, 0.125)
    for cache in (key, key.transpose(1, 2).contiguous().transpose(1, 2)):
        scores = reference._scores(grouped, cache, 0.125)
        assert scores.dtype == torch.float32
        assert ((scores.double() - exact).abs() <= budget).all()
    if dtype != torch.float32:
        rounded = grouped @ key.transpose(-1, -2) * 0.125
        assert ((rounded.double() - exact).abs() > budget).any()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("tile", [reference.TILE, reference.FIXED_TILE])
def test_the_tiled_softmax_is_within_its_budget(dtype: torch.dtype, tile: int) -> None:
    query, key, _ = case(2, 6, 2, 2500, 64, 1, dtype, spread=4.0)
    mask = torch.ones(2, 1, 1, 2500, dtype=torch.bool)
    mask[1, ..., 600:700] = False
    grouped = query.view(2, 2, 3, 64)
    softmax = reference._tiled_softmax(grouped, key, mask, 0.125, tile)
    cdf = softmax.cdf.double()
    inside = cdf.diff(dim=-1, prepend=torch.zeros_like(cdf[..., :1])) / cdf[..., -1:]
    p = (inside * (softmax.mass / softmax.mass.sum(-1, keepdim=True))[..., None]).flatten(-2)
    exact = grouped.double() @ key.double().transpose(-1, -2) * 0.125
    exact = exact.masked_fill(~mask, -torch.inf)
    budget = softmax_budget(exact, score_budget(grouped, key, 0.125), tile, torch.float32)
    error = (p[..., :2500] - exact.softmax(-1)).abs().sum(-1)
    assert (error <= budget).all()
    assert (p[..., 2500:] == 0).all()
    # The budget is worth having: hundreds of times below what 16-bit weights would cost.
    assert budget.max() < 1e-3


@pytest.mark.parametrize("path", ["gather", "all rows"])
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=str)
@each_allocation
def test_averages_are_within_their_budget(
    monkeypatch: pytest.MonkeyPatch, allocation: Any, dtype: torch.dtype, path: str
) -> None:
    """Either way of reading values, across the boundaries of the blocks that 16-bit rows go in."""
    monkeypatch.setattr(reference, "_GATHER_COST", 0 if path == "gather" else 1 << 40)
    for length in (2047, 2048, 2049, 4097):
        query, key, value = case(2, 6, 2, length, 16, 24, dtype)
        given = arguments(query, allocation=allocation)
        draws = reference.draw(query, key, **given)
        weight = draws.weight.expand_as(draws.index)
        b, h = torch.arange(2).view(2, 1, 1, 1), torch.arange(2).view(1, 2, 1, 1)
        rows = value.double()[b, h, draws.index]
        exact = (weight.unsqueeze(-2) @ rows).view(2, 6, 1, 24)
        budget = average_budget(weight, rows, dtype).view(2, 6, 1, 24)
        out = reference.decode(query, key, value, **given)
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [None, "left padding", "holes", "static tail", "expanded"])
def test_dense_is_softmax_attention(dtype: torch.dtype, kind: str | None) -> None:
    mask = None if kind is None else _mask(kind, 2, 420)
    for heads, kv_heads, value_dim in ((2, 2, 16), (6, 2, 24), (5, 1, 8), (7, 1, 16), (8, 1, 16)):
        query, key, value = case(2, heads, kv_heads, 420, 16, value_dim, dtype)
        out = reference.decode(query, key, value, **arguments(query, estimator="dense", mask=mask))
        exact = attention(query, key, value, 0.25, mask)
        budget = attention_budget(query, key, value, 0.25, mask)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= budget


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory held at one time beyond what was there before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# Few draws are gathered, many are added to a row of weights; the paths meet at N / 8 per group.
@pytest.mark.parametrize("samples", [64, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_allocation
@pytest.mark.parametrize("estimator", ["systematic", "multinomial"])
def test_memory_is_proportional_to_heads_times_keys(
    estimator: str, allocation: Any, dtype: torch.dtype, samples: int
) -> None:
    heads, kv_heads, length, dim = 8, 2, 16384, 128
    query, key, value = case(1, heads, kv_heads, length, dim, dim, dtype)
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.arange(length).view(1, 1, 1, length) >= 5
    # The float32 scores, their exponentials and sums; 16-bit keys pass through one block of float32;
    # a draw is a few int64 and float64. Rows are gathered, as stored and in float32, only where they
    # are at most an eighth of all.
    block = 4 * kv_heads * 2048 * dim
    gathered = min(heads * samples, kv_heads * length // 8)
    budget = 12 * heads * length + block + 64 * heads * samples + 6 * dim * gathered
    # A float32 copy of the keys or the values, or a stored copy per query head, would not fit.
    assert budget < 0.6 * 4 * kv_heads * length * dim
    for cache, visible in ((key, None), (transposed, None), (key, mask)):
        given = arguments(
            query, estimator=estimator, allocation=allocation, samples=samples, mask=visible
        )
        assert peak_bytes(lambda: reference.decode(query, cache, value, **given)) <= budget  # noqa: B023


def test_counts_and_rows_read() -> None:
    index = torch.tensor([[[[0, 0, 3], [3, 4, 1]], [[2, 2, 2], [2, 2, 5]]]])
    weight = torch.tensor(
        [[[[0.5, 0.5, 0.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]]]
    )
    draws = reference.Draws(index, weight.double(), torch.ones(1, 2, 2, 1, dtype=torch.float64))
    assert draws.counts(6).tolist() == [
        [
            [[2, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0]],
            [[0, 0, 3, 0, 0, 0], [0, 0, 2, 0, 0, 0]],
        ]
    ]
    # KV head 0: rows 0, 1, 3, 4 (3 once, for both query heads); KV head 1: row 2.
    assert draws.rows_read(6) == 5


def test_rows_read_is_at_most_the_budget_of_the_group() -> None:
    query, key, _ = case(2, 6, 2, 1000, 8, 4, spread=0.1)
    draws = reference.draw(query, key, **arguments(query, samples=20))
    read = int(draws.rows_read(1000))
    expected = (draws.counts(1000) > 0).any(2).sum()
    assert read == expected
    assert read <= 2 * 2 * 3 * 20
