"""Thousands of tokens: memory stays bounded, steps do not slow down, and a saved cache goes on.

SANTA_HF_LONG_RUN sets the number of tokens, 20000 for the full run.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache, StoppingCriteria

from santa_hf.integration.cache import CHUNK, InPlaceLayer

TOKENS = int(os.environ.get("SANTA_HF_LONG_RUN", "1500"))
PROMPT = tiny.prompts(100)[0]


class Watch(StoppingCriteria):
    """Notes the time of every step, and now and then the tensors alive and the room in the cache."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.times: list[float] = []
        self.tensors: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if len(self.times) % 500 == 499:
            gc.collect()
            self.tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            for layer in self.cache.layers:
                assert isinstance(layer, InPlaceLayer)
                length = layer.keys.shape[2]
                for buffer in (layer._key_buffer, layer._value_buffer):
                    assert buffer.rows is not None
                    assert buffer.rows.shape[2] <= length + 1 + max(CHUNK, length // 8)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_memory_is_bounded_and_steps_stay_as_fast(family: str) -> None:
    model = tiny.build(family, num_hidden_layers=1, max_position_embeddings=TOKENS + 200)
    tiny.use(model, "santa", samples=8, strict=True)
    cache = DynamicCache(config=model.config)
    watch = Watch(cache)
    model.generate(
        PROMPT,
        max_new_tokens=TOKENS,
        do_sample=False,
        past_key_values=cache,
        stopping_criteria=[watch],
    )
    assert len(watch.times) == TOKENS
    assert max(watch.tensors) <= watch.tensors[0] + 8
    steps = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    # The 20th percentile: another process on the machine slows some steps, never all.
    early, late = (statistics.quantiles(steps[i : i + 400], n=5)[0] for i in (50, TOKENS - 401))
    # A window of 40 tokens costs the same for ever; a full layer reads what has been written.
    growth = 1.0 if family == "mistral" else 1.0 + TOKENS / 2000
    assert late < 2 * growth * early, (early, late)


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
