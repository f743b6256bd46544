"""Caches, masks and dtypes that do not fit: an error that says what, and nothing out of bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

PROMPT = tiny.prompts(60)[0]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.use(tiny.shared("llama"), "santa", samples=8)


def contents(cache: Cache) -> list[torch.Tensor]:
    return [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]


def filled(model: PreTrainedModel, cache: Cache | None = None) -> Cache:
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(PROMPT, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"\(1, 4, 16\), and this step adds \(1, 2, 16\)"),
        ({"head_dim": 24}, r"\(1, 2, 24\), and this step adds \(1, 2, 16\)"),
    ],
)
def test_a_cache_of_another_model(
    model: PreTrainedModel, changes: dict[str, int], message: str
) -> None:
    cache = filled(tiny.use(tiny.build("llama", **changes), "santa"))
    before = contents(cache)
    with pytest.raises(ValueError, match=f"cache holds states of .* = {message}.*another model"):
        model(PROMPT[:, :1], past_key_values=cache)
    assert all(map(torch.equal, contents(cache), before))


def test_a_cache_of_another_batch(model: PreTrainedModel) -> None:
    cache = filled(model)
    with pytest.raises(ValueError, match=r"\(1, 2, 16\), and this step adds \(2, 2, 16\)"):
        model(PROMPT[:, :1].repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("length", [80, 50])
def test_a_four_dimensional_mask_of_another_length(model: PreTrainedModel, length: int) -> None:
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    cache = filled(model)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"end in the 61 keys of the cache, got \(1, 1, 1, "):
        model(PROMPT[:, :1], past_key_values=cache, attention_mask=mask)
    assert all(map(torch.equal, contents(cache), before))
    model(PROMPT[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1, 1, 61).bool())


def test_a_mask_longer_than_the_cache(model: PreTrainedModel) -> None:
    cache = filled(model)
    before = contents(cache)
    mask = torch.ones(1, 80, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask covers 80 tokens, .* with this step 61"):
        model(PROMPT[:, :1], past_key_values=cache, attention_mask=mask)
    assert all(map(torch.equal, contents(cache), before))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_mask_longer_than_a_static_cache(model: PreTrainedModel, tokens: int) -> None:
    cache = filled(model, StaticCache(config=model.config, max_cache_len=64))
    before = contents(cache)
    for length in (65, 80):
        mask = torch.ones(1, length, dtype=torch.int64)
        with pytest.raises(ValueError, match=rf"covers {length} tokens, .* with this step 64"):
            model(PROMPT[:, :tokens], past_key_values=cache, attention_mask=mask)
    assert all(map(torch.equal, contents(cache), before))
    # One for all that the cache will ever hold is fine.
    model(PROMPT[:, :tokens], past_key_values=cache, attention_mask=torch.ones(1, 64))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_more_tokens_than_a_static_cache_holds(family: str) -> None:
    model = tiny.use(tiny.shared(family), "santa", samples=8)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model.generate(PROMPT, past_key_values=cache, max_new_tokens=5, do_sample=False)
    before = contents(cache)
    assert cache.layers[1].cumulative_length == 64  # a full layer in both
    with pytest.raises(ValueError, match=r"position 64 is beyond .* max_cache_len=64"):
        model(PROMPT[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len=64"):
        model.generate(
            torch.cat([PROMPT, PROMPT[:, :5]], 1), past_key_values=cache, max_new_tokens=5
        )
    assert all(map(torch.equal, contents(cache), before))


def test_mixed_dtypes(model: PreTrainedModel) -> None:
    cache = filled(tiny.use(tiny.shared("llama", torch.float64), "santa"))
    with pytest.raises(
        TypeError, match=r"query is torch\.float32, and the cache holds torch\.float64"
    ):
        model(PROMPT[:, :1], past_key_values=cache)
