"""The cache that grows in place: DynamicLayer's contents after any operations, without its copies."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import santa_hf
from santa_hf.integration import cache as cache_module
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


class BytesWritten(TorchDispatchMode):
    """Counts the bytes that operations write. Views write nothing, nor do allocations, which are only
    filled with NaN here (conftest)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(word in func.name() for word in ("empty", "fill")):
            self.count += sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)))
        return out


@pytest.mark.parametrize("kind", PAIRS)
def test_steps_write_a_bounded_number_of_bytes(kind: str) -> None:
    """For every token that was ever added, at most its own row and eight that were there already; at
    the first step after a prompt its own alone. Stock layers write all they hold at every step."""
    stock_class, our_class, arguments = PAIRS[kind]
    prompt, steps, row = 1000, 2000, 4 * 2 * (8 + 4)
    new = [states(1, 1) for _ in range(steps)]
    written = {}
    for layer in (stock_class(**arguments), our_class(**arguments)):
        layer.update(*states(1, prompt))
        with BytesWritten() as first:
            layer.update(*new[0])
        with BytesWritten() as later:
            for step in new[1:]:
                layer.update(*step)
                if isinstance(layer, InPlaceLayer) and kind == "full":
                    length = layer.keys.shape[2]
                    for buffer in (layer._key_buffer, layer._value_buffer):
                        assert buffer.rows is not None
                        assert buffer.rows.shape[2] <= length + max(CHUNK, length // 8)
        written[type(layer)] = first.count, later.count
    first_bytes, later_bytes = written[our_class]
    assert first_bytes == row
    assert later_bytes <= 9 * row * (prompt + steps)
    held = WINDOW if kind == "sliding" else prompt
    assert written[stock_class][0] >= held * row  # the count can fail
    assert written[stock_class][1] >= held * row * (steps - 1)


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


BATCH = tiny.left_padded(tiny.prompts(150, 90))
# A prompt that repeats itself, for prompt lookup to find.
REPEATED = torch.cat([tiny.prompts(150)[0], tiny.prompts(150)[0][:, 100:130]], 1)


def greedy(model: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    arguments = {**BATCH, "max_new_tokens": 40, "do_sample": False, **kwargs}
    return model.generate(**arguments)


def several_turns(model: PreTrainedModel) -> torch.Tensor:
    """Three turns over one cache, the last after its end was cropped."""
    cache = DynamicCache(config=model.config)
    tokens = BATCH["input_ids"][:1]
    for turn in tiny.prompts(7, 45, 3, seed=5):
        tokens = torch.cat([tokens, turn], 1)
        settings = {"attention_mask": None, "past_key_values": cache, "max_new_tokens": 30}
        tokens = greedy(model, input_ids=tokens, **settings)
        if not any(cache.is_sliding):
            cache.crop(-5)
            tokens = tokens[:, :-5]
    return tokens


def plain_forward(model: PreTrainedModel) -> torch.Tensor:
    """A loop of calls without generate, which makes its cache in the model's forward."""
    with torch.no_grad():
        out = model(BATCH["input_ids"][:1])
        tokens = [out.logits[:, -1:].argmax(-1)]
        for _ in range(30):
            out = model(tokens[-1], past_key_values=out.past_key_values)
            tokens.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


WAYS = {
    "greedy": greedy,
    "beams": lambda model: greedy(model, num_beams=3),
    "several turns": several_turns,
    "plain forward": plain_forward,
    "prompt lookup": lambda model: greedy(
        model, input_ids=REPEATED, attention_mask=None, prompt_lookup_num_tokens=4
    ),
    "assisted": lambda model: greedy(
        model,
        input_ids=REPEATED,
        attention_mask=None,
        assistant_model=tiny.use(tiny.shared("qwen2", torch.float64), "sdpa"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_equals_the_stock_cache(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8, strict=True)
    updates: list[int] = []
    append = InPlaceLayer._append

    def counted(*args: Any) -> Any:
        updates.append(1)
        return append(*args)

    monkeypatch.setattr(InPlaceLayer, "_append", counted)
    ours = WAYS[way](model)
    assert updates
    calls = santa_hf.stats(model).total
    assert calls.sampled  # when assisted, a last token that was not proposed
    assert (calls.multi_token > 20 * tiny.LAYERS) == (way in ("prompt lookup", "assisted"))
    assert not calls.fallbacks
    updates.clear()
    monkeypatch.setattr(cache_module, "_IN_PLACE", {})
    assert torch.equal(WAYS[way](model), ours)
    assert not updates


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_a_cache_every_token_is_computed_exactly(family: str) -> None:
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8, strict=True)
    ours = greedy(model, use_cache=False, max_new_tokens=12)
    calls = santa_hf.stats(model).total
    assert (calls.sampled, calls.multi_token) == (0, 12 * tiny.LAYERS)
    tiny.use(model, "sdpa")
    assert torch.equal(ours, greedy(model, use_cache=False, max_new_tokens=12))
