"""Thousands of tokens: memory stays bounded, steps do not slow down, and a saved cache goes on.

SANTA_HF_LONG_RUN sets the number of tokens, 20000 for the full run.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteria

from santa_hf.integration.cache import CHUNK, InPlaceLayer

TOKENS = int(os.environ.get("SANTA_HF_LONG_RUN", "1500"))
PROMPT = tiny.prompts(100)[0]
LONG_PROMPT = tiny.prompts(2000)[0]
ROW = 4 * tiny.KV_HEADS * 2 * 16  # bytes of one token's keys and values in one layer


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind these tensors, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cache_bytes(cache: DynamicCache) -> int:
    return bytes_of(states for layer in cache.layers for states in (layer.keys, layer.values))


class Watch(StoppingCriteria):
    """Notes the processor time of every step, and now and then the bytes of all tensors alive and of
    the cache. (Wall time would also count other processes.)"""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.others: list[int] = []
        self.cached: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if len(self.times) % 250 == 3:
            gc.collect()
            # Tensors of a compiler's traces, which other tests may have left, have no memory.
            plain = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
            alive = bytes_of(o for o in plain if not torch._is_functional_tensor(o))
            self.tokens.append(input_ids.shape[1])
            self.cached.append(cache_bytes(self.cache))
            self.others.append(alive - self.cached[-1])
        self.times.append(time.thread_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(family: str) -> tuple[PreTrainedModel, torch.Tensor, Watch]:
    """TOKENS tokens by a model of one layer, and what was seen on the way."""
    longest = LONG_PROMPT.shape[1] + TOKENS + 500
    model = tiny.build(family, num_hidden_layers=1, max_position_embeddings=longest)
    tiny.use(model, "santa", samples=8, strict=True)
    watch = Watch(DynamicCache(config=model.config))
    tokens = model.generate(
        LONG_PROMPT,
        max_new_tokens=TOKENS,
        do_sample=False,
        past_key_values=watch.cache,
        stopping_criteria=[watch],
    )
    assert len(watch.times) == TOKENS
    assert isinstance(watch.cache.layers[0], InPlaceLayer)
    # The ids, and a few vectors as long.
    for tokens_then, others in zip(watch.tokens, watch.others, strict=True):
        assert others <= watch.others[0] + 64 * (tokens_then - watch.tokens[0]), watch.others
    print(f"{family}: bytes cached {watch.cached[0]} to {watch.cached[-1]}, ", end="")
    print(f"others {watch.others[0]} to {watch.others[-1]}")
    return model, tokens, watch


def test_a_window_costs_the_same_for_ever() -> None:
    """A sliding layer after a prompt of 50 windows: neither bytes nor time grow, from the first step."""
    _, _, watch = run("mistral")
    assert max(watch.cached) <= ROW * (tiny.WINDOW + max(CHUNK, tiny.WINDOW // 8))
    steps = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    # The 20th percentile: another process on the machine slows some steps, never all.
    early, late = (statistics.quantiles(steps[i : i + 400], n=5)[0] for i in (50, TOKENS - 401))
    print(f"mistral: {1e3 * early:.3f} ms a step, at the end {1e3 * late:.3f}")
    assert late < 1.3 * early, (early, late)


def test_a_long_run_leaves_a_cache_as_good_as_new() -> None:
    """On a full layer a step reads all there is. It takes no more memory and time than on a cache into
    which as many tokens were prefilled at once; the steps on the two alternate."""
    model, tokens, watch = run("llama")
    for count, cached in zip(watch.tokens, watch.cached, strict=True):
        assert cached <= ROW * (count + max(CHUNK, count // 8))
    fresh = DynamicCache(config=model.config)
    seconds: dict[str, list[float]] = {"run": [], "fresh": []}
    with torch.no_grad():
        # The last token that was generated is not in the cache yet.
        model(tokens[:, :-1], past_key_values=fresh, logits_to_keep=1)
        assert fresh.get_seq_length() == watch.cache.get_seq_length()
        for _ in range(200):
            for name, cache in (("run", watch.cache), ("fresh", fresh)):
                start = time.thread_time()
                model(tokens[:, -1:], past_key_values=cache)
                seconds[name].append(time.thread_time() - start)
    after_run, after_prefill = (statistics.median(seconds[name]) for name in ("run", "fresh"))
    print(f"llama: {1e3 * after_run:.3f} ms a step, after one prefill {1e3 * after_prefill:.3f}")
    assert after_run < 1.2 * after_prefill, (after_run, after_prefill)
    assert cache_bytes(watch.cache) <= 1.125 * cache_bytes(fresh)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_cache_goes_on(family: str, kind: str, tmp_path: Path) -> None:
    """Interrupted, written to disk and read back: the tokens of a run without interruption."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8)

    def new() -> DynamicCache | StaticCache:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=256)

    def on(tokens: torch.Tensor, count: int, cache: DynamicCache | StaticCache) -> torch.Tensor:
        return model.generate(tokens, max_new_tokens=count, do_sample=False, past_key_values=cache)

    expected = on(PROMPT, 60, new())
    cache = new()
    tokens = on(PROMPT, 25, cache)
    torch.save((tokens, cache), tmp_path / "state.pt")
    on(tokens, 5, cache)  # what happens to the original later is not in the file
    tokens, cache = torch.load(tmp_path / "state.pt", weights_only=False)
    assert torch.equal(on(tokens, 35, cache), expected)
    tiny.use(model, "santa", samples=8, seed=1)
    assert not torch.equal(on(PROMPT, 60, new()), expected), "the draws do not matter here"
