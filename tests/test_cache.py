"""The cache that grows in place: DynamicLayer's contents after any operations, without its copies."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer

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


ROW = 4 * 2 * (8 + 4)  # bytes of one token's keys and values, as `states` makes them


def held_bytes(*layers: DynamicLayer) -> int:
    """Bytes of all memory that these layers keep alive, whatever they call it."""
    storages: dict[int, int] = {}
    todo: list[Any] = list(layers)
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo += vars(item).values()
    return sum(storages.values())


def room(tokens: int) -> int:
    """What the README allows a buffer that is made for so many tokens."""
    return tokens + max(CHUNK, tokens // 8)


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
            if not getattr(ours, "record_past", False):
                most = room(2 * WINDOW) if kind == "sliding" else 2 * room(ours.keys.shape[2])
                assert held_bytes(ours) <= batch * ROW * most + 8
        elif operation == "reset":
            if rng.random() < 0.3:
                stock.keys = stock.values = None  # 5.17 zeroes them
                stock.is_initialized = False
                stock.reset()
                ours.reset()
                assert held_bytes(ours) <= 8
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
                assert held_bytes(ours) <= held_bytes(stock)
            elif operation == "select" and batch > 2:
                index = torch.tensor(rng.sample(range(batch), batch // 2))
                stock.batch_select_indices(index)
                ours.batch_select_indices(index)
                batch //= 2
                assert held_bytes(ours) <= held_bytes(stock)
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
    prompt, steps = 1000, 2000
    new = [states(1, 1) for _ in range(steps)]
    written = {}
    for layer in (stock_class(**arguments), our_class(**arguments)):
        layer.update(*states(1, prompt))
        with BytesWritten() as first:
            layer.update(*new[0])
        with BytesWritten() as later:
            for step in new[1:]:
                layer.update(*step)
                if isinstance(layer, InPlaceLayer):
                    # A window is followed by the token that sees it.
                    most = WINDOW if kind == "sliding" else layer.keys.shape[2]
                    assert held_bytes(layer) <= ROW * room(most) + 8
        written[type(layer)] = first.count, later.count
    first_bytes, later_bytes = written[our_class]
    assert first_bytes == ROW
    assert later_bytes <= 9 * ROW * (prompt + steps)
    held = WINDOW if kind == "sliding" else prompt
    assert written[stock_class][0] >= held * ROW  # the count can fail
    assert written[stock_class][1] >= held * ROW * (steps - 1)


@pytest.mark.parametrize("chunks", [(4096,), (1000, 1000), (WINDOW - 1, 7, WINDOW - 1), (10, 500)])
def test_a_long_prompt_leaves_its_window_in_a_sliding_layer(chunks: tuple[int, ...]) -> None:
    """Not the buffer of a prompt until the window has moved past its end, 500 steps later."""
    stock, ours = DynamicSlidingWindowLayer(WINDOW), InPlaceSlidingWindowLayer(WINDOW)
    for queries in (*chunks, *[1] * 400):
        new = states(1, queries)
        for got, want in zip(ours.update(*new), stock.update(*new), strict=True):
            assert torch.equal(got, want)
        del got, want
        same(stock, ours)
        assert held_bytes(ours) <= ROW * room(2 * WINDOW) + 8
        assert ours._buffer is not None  # which the next step writes to


def test_a_prompt_beyond_the_window_is_returned_as_it_came() -> None:
    layer, prompt = InPlaceSlidingWindowLayer(WINDOW), states(1, 100)
    with BytesWritten() as written:
        keys, values = layer.update(*prompt)
    assert keys is prompt[0]
    assert values is prompt[1]
    assert written.count <= ROW * (WINDOW - 1)


def _concatenated(layer: DynamicLayer) -> None:
    layer.update(*(t.requires_grad_() for t in states(layer.keys.shape[0], 1)))


REPLACING: dict[str, Callable[[DynamicLayer], object]] = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([0, 0, 1])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "autograd": _concatenated,
    "assignment": lambda layer: setattr(layer, "keys", layer.keys.clone()),
}


@pytest.mark.parametrize("operation", REPLACING)
@pytest.mark.parametrize("kind", PAIRS)
def test_no_memory_stays_behind(kind: str, operation: str) -> None:
    """What an operation replaces is let go of by its end, not at the next step."""
    stock_class, our_class, arguments = PAIRS[kind]
    stock, ours = stock_class(**arguments), our_class(**arguments)
    new = states(3, 2000)
    for layer in (stock, ours):
        layer.update(*new)
        layer.update(*(t[:, :, :1] for t in new))
        torch.manual_seed(1)
        REPLACING[operation](layer)
    same(stock, ours)
    length = ours.keys.shape[2]
    in_place = {"reorder": 2, "assignment": 1}.get(operation, 0)  # tensors that keep head room
    room_kept = ROW * 3 * (room(length + 1) - length)
    assert held_bytes(ours) <= ROW * ours.keys.shape[0] * (length + 1) + 8 + room_kept * in_place


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive after any operation, beyond those from before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.now()
        self.bytes = 0

    @staticmethod
    def now() -> int:
        storages = {}
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter):  # no fake ones of a compiler
                storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        return sum(storages.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes = max(self.bytes, self.now() - self.before)
        return out


def test_beams_peak_and_copy_no_more_than_stock_layers() -> None:
    """A beam step chooses rows and adds one. Stock layers copy all they hold twice, these once, and
    need besides the cache itself the copy of one layer."""
    beams, length, layers = 3, 3000, 4
    index, data = torch.tensor([0, 0, 1]), ROW * beams * length
    peak, written = {}, {}
    for kind in (DynamicLayer, InPlaceLayer):
        cache = [kind() for _ in range(layers)]
        for layer in cache:
            layer.update(*states(beams, length))
        gc.collect()
        new = states(beams, 1)
        with Peak() as peaks:
            for layer in cache:
                layer.reorder_cache(index)
            for layer in cache:
                layer.update(*new)
        peak[kind] = peaks.bytes
        with BytesWritten() as count:
            for layer in cache:
                layer.reorder_cache(index)
                layer.update(*new)
        written[kind] = count.count / (layers * data)
        del cache, layer
    assert peak[InPlaceLayer] <= 1.125 * peak[DynamicLayer] + ROW * beams * CHUNK, peak
    assert written[InPlaceLayer] < 1.01 < 1.99 < written[DynamicLayer], written


def test_a_crop_to_little_gives_memory_back_at_the_next_step() -> None:
    layer = InPlaceLayer()
    layer.update(*states(1, 10_000))
    layer.crop(-9_900)
    layer.update(*states(1, 1))
    assert held_bytes(layer) <= ROW * room(101)
    # A crop of a few tokens, as after rejected proposals, moves nothing.
    new = states(1, 3)
    with BytesWritten() as written:
        layer.crop(-3)
        layer.update(*new)
    assert written.count == 3 * ROW


@pytest.mark.parametrize("kind", PAIRS)
def test_a_saved_layer_has_the_rows_that_are_held(kind: str) -> None:
    """Neither cropped rows, which were another prompt's, nor memory that nobody wrote."""
    stock_class, our_class, arguments = PAIRS[kind]
    stock, ours = stock_class(**arguments), our_class(**arguments)
    new = states(1, 5000)
    for layer in (stock, ours):
        layer.update(*new)
        if kind == "full":
            layer.crop(-4900)
    file = io.BytesIO()
    torch.save(ours, file)
    assert file.tell() < ROW * ours.keys.shape[2] + 4000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    same(stock, loaded)
    for layer in (stock, ours, loaded, copy.copy(ours), copy.deepcopy(ours)):
        torch.manual_seed(1)
        layer.update(*states(1, 1))
        same(stock, layer)


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


def test_another_dtype_is_promoted_where_autograd_concatenates() -> None:
    """As by a prefix that is trained in float32. Elsewhere it is an error, see test_misuse."""
    stock, ours = DynamicLayer(), InPlaceLayer()
    for layer in (stock, ours):
        torch.manual_seed(1)
        layer.update(*(t.requires_grad_() for t in states(1, 5)))
        layer.update(*states(1, 1, torch.float64))
    assert ours.keys.dtype == stock.keys.dtype == torch.float64
    same(stock, ours)


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
def test_a_cache_made_from_gathered_states_grows_in_place(family: str) -> None:
    """DynamicCache(ddp_cache_data, config=...), whose layers hold something from the start."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8)
    prompt = tiny.prompts(100)[0]
    gathered = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :30], past_key_values=gathered)
    data = [(layer.keys.clone(), layer.values.clone()) for layer in gathered.layers]
    cache = DynamicCache(data, config=model.config)
    for layer, (keys, values) in zip(cache.layers, data, strict=True):
        assert isinstance(layer, InPlaceLayer)
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_seq_length() == 30
    tokens = [
        model.generate(prompt, past_key_values=c, max_new_tokens=20, do_sample=False)
        for c in (cache, gathered)
    ]
    assert torch.equal(*tokens)


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
    monkeypatch.setattr(cache_module, "_LAYERS", {})
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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_length_of_a_static_cache(family: str) -> None:
    """At, and on either side of, the length of a tile."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8, strict=True)
    settings = {"input_ids": tiny.prompts(90)[0], "attention_mask": None, "max_new_tokens": 36}
    expected = greedy(model, **settings)
    for length in (126, 127, 128, 129, 131):  # the last token is not cached
        cache = StaticCache(config=model.config, max_cache_len=length)
        assert torch.equal(greedy(model, **settings, past_key_values=cache), expected), length
        if length < 128:
            assert cache.layers[1].cumulative_length == 125
    assert santa_hf.stats(model).total.sampled


class HostStream(contextlib.nullcontext[None]):
    """Stands in for a stream of a GPU: on the CPU everything is in order."""

    def wait_stream(self, other: object) -> None:
        pass


class StoredLayer(QuantizedLayer):
    """A quantised layer whose quantisation is a copy, so that nothing is lost. Counts them."""

    quantised = 0

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        StoredLayer.quantised += 1
        return tensor.clone()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor


def _offloaded(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config, offloading=True)


def _quantised(model: PreTrainedModel) -> Cache:
    return Cache(layers=[StoredLayer(residual_length=16) for _ in range(tiny.LAYERS)])


@pytest.mark.parametrize("make", [_offloaded, _quantised])
def test_offloaded_and_quantised_caches_are_left_alone(
    make: Callable[[PreTrainedModel], Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: HostStream())
    offloads: list[int] = []
    offload = DynamicLayer.offload
    monkeypatch.setattr(DynamicLayer, "offload", lambda self: (offloads.append(1), offload(self)))
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=8, strict=True)
    expected = greedy(model)
    cache = make(model)
    kinds = [type(layer) for layer in cache.layers]
    assert not any(issubclass(kind, InPlaceLayer) for kind in kinds)
    StoredLayer.quantised = 0
    assert torch.equal(greedy(model, past_key_values=cache), expected)
    assert [type(layer) for layer in cache.layers] == kinds
    if make is _offloaded:
        assert len(offloads) == 40 * tiny.LAYERS
    else:
        assert StoredLayer.quantised > 2 * tiny.LAYERS
