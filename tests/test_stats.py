"""Counters: what is summed, what is reset, and what does not outlive its module."""

from __future__ import annotations

import gc
import importlib
import math
import warnings
from collections import Counter

import pytest
import torch

# The package's attribute `stats` is the function.
stats = importlib.import_module("santa_hf.stats")


def model(*indices: int | None) -> torch.nn.ModuleList:
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in indices)
    for layer, index in zip(layers, indices, strict=True):
        if index is not None:
            layer.layer_idx = index
    return layers


def test_totals_are_sums_over_layers() -> None:
    layers = model(1, 0, 2)
    for n, layer in enumerate(layers, start=1):
        counters = stats.layer_stats(layer)
        counters.sampled += n
        counters.samples += 10 * n
        counters.fallbacks["a reason"] += n
        counters.rows_read += n
        counters.rows_visible += 4 * n
    result = stats.stats(layers)
    assert result.total == stats.LayerStats(
        sampled=6, samples=60, fallbacks=Counter({"a reason": 6}), rows_read=6, rows_visible=24
    )
    assert list(result.layers) == [0, 1, 2]
    assert [result.layers[i].sampled for i in range(3)] == [2, 1, 3]
    assert result.total.share_of_rows_read == 0.25
    assert "6 (60 draws)" in str(result)
    assert "25.00%" in str(result)
    assert "fallback: a reason  6" in str(result)


def test_a_result_is_a_snapshot() -> None:
    layers = model(0)
    stats.layer_stats(layers[0]).sampled += 1
    before = stats.stats(layers)
    before.total.fallbacks["other"] += 5
    stats.layer_stats(layers[0]).sampled += 1
    assert before.total.sampled == before.layers[0].sampled == 1
    assert stats.stats(layers).total == stats.LayerStats(sampled=2)


def test_modules_that_share_an_index_are_added_and_one_without_has_its_own() -> None:
    layers = model(0, 0, None)
    for layer in layers:
        stats.layer_stats(layer).dense += 1
    assert {i: s.dense for i, s in stats.stats(layers).layers.items()} == {-1: 1, 0: 2}


def test_only_the_model_asked_for_is_counted_or_reset() -> None:
    one, other = model(0), model(0)
    stats.layer_stats(one[0]).multi_token += 1
    stats.layer_stats(other[0]).multi_token += 2
    assert stats.stats(one).total.multi_token == 1
    stats.reset_stats(one)
    assert stats.stats(one).total == stats.LayerStats()
    assert stats.stats(one).layers == {}
    assert stats.stats(other).total.multi_token == 2


def test_counters_do_not_keep_a_model_alive() -> None:
    layers = model(0)
    stats.layer_stats(layers[0])
    assert len(stats._by_module) == 1
    del layers
    gc.collect()
    assert len(stats._by_module) == 0


def test_share_of_nothing_is_nan() -> None:
    assert math.isnan(stats.LayerStats().share_of_rows_read)
    assert "value rows" not in str(stats.stats(model(0)))


def test_row_counting_is_scoped_and_nests() -> None:
    assert not stats.counting_value_rows()
    with stats.count_value_rows():
        assert stats.counting_value_rows()
        with stats.count_value_rows():
            pass
        assert stats.counting_value_rows()
    assert not stats.counting_value_rows()
    with pytest.raises(RuntimeError, match="inside"), stats.count_value_rows():
        raise RuntimeError("inside")
    assert not stats.counting_value_rows()


def test_a_reason_warns_once() -> None:
    with pytest.warns(UserWarning, match="first"):
        stats.warn_once("reason", "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats.warn_once("reason", "second")
    with pytest.warns(UserWarning, match="third"):
        stats.warn_once("another reason", "third")


def test_exact_rows_are_taken_off_when_counters_are_read() -> None:
    """Over more calls than are kept, of two shapes and budgets; once, and not after a reset."""
    layers = model(0, 1)
    generator = torch.Generator().manual_seed(1)
    dense = samples = calls = 0
    for i in range(700):
        rows, draws = (3, 8) if i % 3 else (2, 5)
        exact = torch.rand(rows, generator=generator) < 0.6
        counters = stats.layer_stats(layers[0])
        counters.sampled += 1
        counters.samples += rows * draws
        stats.count_as_dense(layers[0], exact, draws)
        calls += 1
        dense += int(exact.all())
        samples += int((~exact).sum()) * draws
        held = sum(len(rows.calls) for rows in stats._exact_rows[layers[0]].values())
        assert held <= 2 * 256
    for _ in range(2):
        total = stats.stats(layers).total
        assert (total.sampled, total.dense, total.samples) == (calls - dense, dense, samples)
    stats.count_as_dense(layers[0], torch.ones(2, dtype=torch.bool), 8)
    stats.reset_stats(layers)
    assert stats.stats(layers).total == stats.LayerStats()
