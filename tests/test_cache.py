"""The cache that grows in place: DynamicLayer's contents after any operations, without its copies."""

from __future__ import annotations

import copy
import random

import pytest
import tiny
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from santa_hf.integration.cache import CHUNK, InPlaceLayer, InPlaceSlidingWindowLayer

WINDOW = 24
PAIRS = {
    "full": (DynamicLayer, InPlaceLayer, {}),
    "sliding": (
        DynamicSlidingWindowLayer,
        InPlaceSlidingWindowLayer,
        {"sliding_window": WINDOW},
    ),
}


def states(batch: int, queries: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Keys and values as a projection leaves them: (B, KVH, q, D), transposed views."""
    return [torch.randn(batch, queries, 2, d, dtype=dtype).transpose(1, 2) for d in (8, 4)]


def same(stock: DynamicLayer, ours: DynamicLayer) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1)
    if stock.is_initialized and stock.get_seq_length():
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations_leaves_what_dynamic_layers_hold(kind: str, seed: int) -> None:
    stock_class, our_class, arguments = PAIRS[kind]
    stock, ours = stock_class(**arguments), our_class(**arguments)
    rng, batch = random.Random(seed), 2
    if kind == "sliding" and seed % 2:
        stock.activate_past_recording()
        ours.activate_past_recording()
    for _ in range(120):
        operation = rng.choice(
            ["step"] * 8 + ["chunk", "crop", "reorder", "repeat", "select", "reset"]
        )
        if operation in ("step", "chunk"):
            new = states(batch, 1 if operation == "step" else rng.randint(2, 40))
            expected = stock.update(*new)
            for got, want in zip(ours.update(*new), expected, strict=True):
                assert torch.equal(got, want)
        elif operation == "reset":
            if rng.random() < 0.3:  # 5.17 zeroes a dynamic layer instead of emptying it
                stock, ours = stock_class(**arguments), our_class(**arguments)
                batch = 2
        elif stock.get_seq_length() > 3:
            if operation == "crop":
                if kind == "sliding" and not stock.record_past:
                    continue
                remove = -rng.randint(1, 3)
                stock.crop(remove)
                ours.crop(remove)
            elif operation == "reorder":
                index = torch.tensor([rng.randrange(batch) for _ in range(batch)])
                stock.reorder_cache(index)
                ours.reorder_cache(index)
            elif operation == "repeat" and batch < 8:
                stock.batch_repeat_interleave(2)
                ours.batch_repeat_interleave(2)
                batch *= 2
            elif operation == "select" and batch > 2:
                index = torch.tensor(rng.sample(range(batch), batch // 2))
                stock.batch_select_indices(index)
                ours.batch_select_indices(index)
                batch //= 2
        same(stock, ours)


@pytest.mark.parametrize("kind", PAIRS)
def test_steps_copy_a_bounded_number_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, our_class, arguments = PAIRS[kind]
    layer, prompt, steps = our_class(**arguments), 1000, 2000
    layer.update(*states(1, prompt))
    allocated = 0
    held_at_first = layer._key_buffer.rows.data_ptr()
    original = torch.Tensor.new_empty

    def counted(self: torch.Tensor, *shape: int, **kwargs: object) -> torch.Tensor:
        nonlocal allocated
        allocated += shape[2]
        return original(self, *shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    for i in range(steps):
        layer.update(*states(1, 1))
        if i == 0:
            assert layer._key_buffer.rows.data_ptr() == held_at_first, "the first step copied"
        # What is held when it was last allocated, and the head room.
        capacity, length = layer._key_buffer.rows.shape[2], layer.keys.shape[2]
        if kind == "full":
            assert capacity <= length + max(CHUNK, length // 8)
    # Keys and values, each at most eight rows copied and one written per step.
    assert allocated <= 2 * 10 * (steps + prompt)


def test_a_copy_of_a_cache_is_independent() -> None:
    layer = InPlaceLayer()
    layer.update(*states(1, 50))
    other = copy.deepcopy(layer)
    before = layer.keys.clone()
    other.update(*states(1, 1))
    layer.update(*states(1, 1))
    assert torch.equal(layer.keys[:, :, :50], before)
    assert not torch.equal(layer.keys[:, :, 50], other.keys[:, :, 50])


def test_a_cache_filled_in_inference_mode_grows_outside_of_it() -> None:
    stock, ours = DynamicLayer(), InPlaceLayer()
    first, second, third = states(1, 5), states(1, 1), states(1, 1)
    for layer in (stock, ours):
        with torch.inference_mode():
            layer.update(*first)
        layer.update(*second)
        layer.update(*third)
    same(stock, ours)


def test_autograd_goes_through_concatenation() -> None:
    stock, ours = DynamicLayer(), InPlaceLayer()
    first, second = states(1, 5), states(1, 2)
    gradients = []
    for layer in (stock, ours):
        inputs = [t.detach().clone().requires_grad_() for t in (*first, *second)]
        layer.update(*inputs[:2])
        keys, values = layer.update(*inputs[2:])
        (keys.square().sum() + values.sum()).backward()
        gradients.append([t.grad for t in inputs])
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


def test_another_dtype_is_treated_as_torch_cat_does() -> None:
    stock, ours = DynamicLayer(), InPlaceLayer()
    for layer in (stock, ours):
        torch.manual_seed(1)
        layer.update(*states(1, 5))
        layer.update(*states(1, 1, torch.float64))
        layer.update(*states(1, 1, torch.float64))
    assert ours.keys.dtype == stock.keys.dtype
    assert torch.equal(ours.keys, stock.keys)


def test_only_caches_of_models_that_ask_for_santa_change() -> None:
    model = tiny.use(tiny.build("gemma3"), "santa")
    layers = DynamicCache(config=model.config).layers
    assert {type(layer) for layer in layers} == {InPlaceLayer, InPlaceSlidingWindowLayer}
    assert [layer.is_sliding for layer in layers] == [True, False, True]

    class UserCache(DynamicCache):
        pass

    others = [
        UserCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
    ]
    if torch.cuda.is_available():
        others.append(DynamicCache(config=model.config, offloading=True))
    tiny.use(model, "sdpa")
    others.append(DynamicCache(config=model.config))
    for cache in others:
        assert not any(isinstance(layer, InPlaceLayer) for layer in cache.layers), type(cache)
    assert not issubclass(QuantizedCache, DynamicCache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_equals_the_stock_cache(family: str) -> None:
    model = tiny.use(tiny.build(family, torch.float64), "santa", samples=8)
    batch = tiny.left_padded(tiny.prompts(150, 90))
    ours = model.generate(**batch, max_new_tokens=40, do_sample=False)
    layers = [
        DynamicSlidingWindowLayer(sliding_window=tiny.WINDOW)
        if layer.is_sliding
        else DynamicLayer()
        for layer in DynamicCache(config=model.config).layers
    ]
    stock = DynamicCache(config=model.config)
    stock.layers = layers
    theirs = model.generate(**batch, max_new_tokens=40, do_sample=False, past_key_values=stock)
    assert torch.equal(ours, theirs)
    assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in stock.layers)
