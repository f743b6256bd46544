"""Caches, masks and dtypes that do not fit: an error that says what, and nothing out of bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    WhisperConfig,
    WhisperForCausalLM,
)

from santa_hf.integration.cache import InPlaceLayer, InPlaceSlidingWindowLayer

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


@contextmanager
def refused(cache: Cache, error: type[Exception], message: str) -> Iterator[None]:
    """The error says this, and every layer holds what it held, and goes on from there."""
    before, lengths = contents(cache), [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(error, match=message):
        yield
    assert all(map(torch.equal, contents(cache), before))
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


# A step, a chunk, and what replaces the whole window of a sliding layer.
QUERIES = [1, 5, tiny.WINDOW]


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"\(1, 4, 16\), and this step adds \(1, 2, 16\)"),
        ({"head_dim": 24}, r"\(1, 2, 24\), and this step adds \(1, 2, 16\)"),
    ],
)
def test_a_cache_of_another_model(
    family: str, changes: dict[str, int], message: str, queries: int
) -> None:
    model = tiny.use(tiny.shared(family), "santa", samples=8)
    cache = filled(tiny.use(tiny.build(family, **changes), "santa"))
    message = f"cache holds key_states of .* = {message}.*another model"
    with refused(cache, ValueError, message):
        model(PROMPT[:, :queries], past_key_values=cache)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_of_another_batch(family: str, queries: int) -> None:
    model = tiny.use(tiny.shared(family), "santa", samples=8)
    cache = filled(model)
    with refused(cache, ValueError, r"\(1, 2, 16\), and this step adds \(2, 2, 16\)"):
        model(PROMPT[:, :queries].repeat(2, 1), past_key_values=cache)
    # It goes on with the batch it has, as one that saw no error.
    step, other = PROMPT[:, :1], filled(model)
    logits = [model(step, past_key_values=c).logits for c in (cache, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("of_model", "of_cache"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_mixed_dtypes(
    family: str, of_model: torch.dtype, of_cache: torch.dtype, queries: int
) -> None:
    cache = filled(tiny.use(tiny.shared(family, of_cache), "santa"))
    model = tiny.use(tiny.shared(family, of_model), "santa", samples=8)
    with refused(cache, TypeError, f"key_states is {of_model}, and the cache holds {of_cache}"):
        model(PROMPT[:, :queries], past_key_values=cache)


@pytest.mark.parametrize("sliding", [False, True])
def test_states_that_do_not_belong_together(sliding: bool) -> None:
    layer = InPlaceSlidingWindowLayer(8) if sliding else InPlaceLayer()
    states = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 16\) .* must be of the same tokens"):
        layer.update(states, states[:, :, :4])
    assert layer.get_seq_length() == 0
    layer.update(states, states)
    for keys, values, error, message in (
        (states, states[:, :, :4], ValueError, "must be of the same tokens"),
        (states, states.double(), TypeError, "value_states is torch.float64"),
        (states.to("meta"), states, ValueError, "key_states is on meta, and .* on cpu"),
    ):
        with refused(Cache(layers=[layer]), error, message):
            layer.update(keys, values)


@pytest.mark.parametrize("length", [80, 50])
def test_a_four_dimensional_mask_of_another_length(model: PreTrainedModel, length: int) -> None:
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    cache = filled(model)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"end in the 61 keys of the cache, got \(1, 1, 1, "):
        model(PROMPT[:, :1], past_key_values=cache, attention_mask=mask)
    assert all(map(torch.equal, contents(cache), before))
    model(PROMPT[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1, 1, 61).bool())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_with_other_layers(family: str, layers: int, static: bool) -> None:
    model = tiny.use(tiny.shared(family), "santa", samples=8)
    cache = filled(model, StaticCache(config=model.config, max_cache_len=64) if static else None)
    types = {"layer_types": ["full_attention"] * layers} if family == "gemma3" else {}
    other = tiny.use(tiny.build(family, num_hidden_layers=layers, **types), "santa", samples=8)
    for queries in QUERIES[:2]:
        with refused(cache, ValueError, f"the {layers} layers of the model, got {tiny.LAYERS}"):
            other(PROMPT[:, :queries], past_key_values=cache)


def test_a_cache_made_without_a_config_takes_any_layers(model: PreTrainedModel) -> None:
    deeper = tiny.use(tiny.build("llama", num_hidden_layers=5), "santa", samples=8)
    assert len(filled(deeper, DynamicCache()).layers) == 5


def test_a_decoder_may_have_fewer_layers_than_its_encoder() -> None:
    """The config of such a decoder counts those of the encoder, and its cache does not."""
    config = WhisperConfig(
        vocab_size=99, d_model=16, encoder_layers=4, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForCausalLM(config).eval()
    model.set_attn_implementation("santa")
    cache = model(PROMPT[:, :5]).past_key_values
    assert len(cache.layers) == 2
    assert cache is model(PROMPT[:, :1], past_key_values=cache).past_key_values
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("queries", QUERIES[:2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("changes", "dtype", "rows", "error", "message"),
    [
        (
            {"num_key_value_heads": 4},
            torch.float32,
            1,
            ValueError,
            r"\(1, 4, 16\), and this step adds",
        ),
        ({"head_dim": 24}, torch.float32, 1, ValueError, r"\(1, 2, 24\), and this step adds"),
        ({}, torch.float64, 1, TypeError, "is torch.float32, and the cache holds torch.float64"),
        ({}, torch.float32, 2, ValueError, r"\(1, 2, 16\), and this step adds \(2, 2, 16\)"),
    ],
)
def test_a_static_cache_of_another_model_dtype_or_batch(
    family: str,
    changes: dict[str, int],
    dtype: torch.dtype,
    rows: int,
    error: type[Exception],
    message: str,
    queries: int,
) -> None:
    other = tiny.use(tiny.build(family, **changes).to(dtype), "santa")
    cache = filled(other, StaticCache(config=other.config, max_cache_len=80))
    model = tiny.use(tiny.shared(family), "santa", samples=8)
    with refused(cache, error, message):
        model(PROMPT[:, :queries].repeat(rows, 1), past_key_values=cache)


def test_a_mask_longer_than_the_cache(model: PreTrainedModel) -> None:
    cache = filled(model)
    mask = torch.ones(1, 80, dtype=torch.int64)
    with refused(cache, ValueError, r"attention_mask covers 80 tokens, .* with this step 61"):
        model(PROMPT[:, :1], past_key_values=cache, attention_mask=mask)


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
    assert cache.layers[1].cumulative_length == 64  # a full layer in both
    with refused(cache, ValueError, r"position 64 is beyond .* max_cache_len=64"):
        model(PROMPT[:, :1], past_key_values=cache)
    longer = torch.cat([PROMPT, PROMPT[:, :5]], 1)
    with refused(cache, ValueError, "max_cache_len=64"):
        model.generate(longer, past_key_values=cache, max_new_tokens=5)
