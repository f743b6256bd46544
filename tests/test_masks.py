"""The mask of a decode step: what SDPA's mask function shows, made without asking the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import santa_hf
from santa_hf.integration.masks import santa_mask

CACHES = ["dynamic", "static", "of full layers"]
# A window is 40 long: rows begin below it, end above it, or are above it from the start.
BATCHES = {
    "plain": tiny.prompts(61, 61),
    "padded": tiny.prompts(61, 30, 5),
    "growing": tiny.prompts(33, 33),
    "growing and padded": tiny.prompts(33, 12),
    "one row": tiny.prompts(33),
}


def shown(mask: torch.Tensor | None, step: dict[str, Any]) -> torch.Tensor:
    shape = step["batch_size"], 1, 1, step["kv_length"]
    mask = torch.ones(1, dtype=torch.bool) if mask is None else mask
    assert mask.dtype == torch.bool
    assert mask.ndim == 1 or mask.shape == shape
    return mask.expand(shape)


def decode(
    model: PreTrainedModel,
    batch: str,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[..., torch.Tensor | None],
) -> None:
    """Generate 20 tokens, with every mask of a decode step made by `watch`."""

    def watched(**step: Any) -> torch.Tensor | None:
        return watch(**step) if step["q_length"] == 1 else santa_mask(**step)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "santa", watched)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    if cache == "of full layers":
        settings["past_key_values"] = DynamicCache()
    else:
        settings["cache_implementation"] = cache
    model.generate(**tiny.left_padded(BATCHES[batch]), **settings)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_masks_show_what_those_of_sdpa_show(
    family: str, batch: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0

    def watch(**step: Any) -> torch.Tensor | None:
        nonlocal compared
        mask = santa_mask(**step)
        expected = sdpa_mask(**{**step, "allow_is_causal_skip": False})
        assert torch.equal(shown(mask, step), shown(expected, step))
        assert mask is not None or step["allow_is_causal_skip"]  # of a compiled step
        compared += 1
        return mask

    model = tiny.use(tiny.shared(family), "santa", samples=8)
    decode(model, batch, cache, monkeypatch, watch)
    assert compared >= 19


@pytest.mark.parametrize("covered", [1, 10, 30, 31, 45])
@pytest.mark.parametrize("window", [None, 1, 7, 31, 100])
@pytest.mark.parametrize(("position", "first"), [(30, 0), (30, 24), (30, 10), (0, 0), (44, 0)])
def test_masks_of_any_offset_and_padding(
    position: int, first: int, window: int | None, covered: int
) -> None:
    generator = torch.Generator().manual_seed(position + first + covered)
    padding = torch.rand(3, covered, generator=generator) < 0.7
    full = window is None
    step = {
        "batch_size": 3,
        "q_length": 1,
        "kv_length": 45 - first,
        "q_offset": position,
        "kv_offset": first,
        "mask_function": causal_mask_function
        if full
        else sliding_window_causal_mask_function(window),
        "local_size": window,
    }
    for attention_mask in (None, padding):
        for skip in (False, True):
            step |= {"attention_mask": attention_mask, "allow_is_causal_skip": skip}
            expected = sdpa_mask(**{**step, "allow_is_causal_skip": False})
            assert torch.equal(shown(santa_mask(**step), step), expected)


def test_other_masks_are_those_of_sdpa() -> None:
    chunked = chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64))
    step = {"batch_size": 2, "q_length": 1, "kv_length": 20, "q_offset": 19, "kv_offset": 0}
    step |= {"mask_function": chunked, "allow_is_causal_skip": False, "local_size": 8}
    assert torch.equal(santa_mask(**step), sdpa_mask(**step))
    assert santa_mask(**step).sum() == 2 * 4


class _Operations(TorchDispatchMode):
    """Counts operations of the device that are no views, and whether the host reads any result."""

    _VIEWS = ("slice", "unsqueeze", "expand", "alias", "select", "_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.reads = 0

    def __torch_dispatch__(
        self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = call.name().removeprefix("aten::").split(".")[0]
        self.reads += name in ("_local_scalar_dense", "is_nonzero", "nonzero")
        self.count += name not in self._VIEWS
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masks_cost_little_and_no_wait(
    family: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in ("dynamic", "static"):
        most = 0 if cache == "dynamic" and family == "llama" else 2

        def watch(most: int = most, **step: Any) -> torch.Tensor | None:
            if isinstance(step["q_offset"], torch.Tensor):
                # As on a GPU, where its value is not on the host: checking it would be a wait.
                monkeypatch.setattr("santa_hf.integration.masks._on_host", lambda _: False)
                most = 4
            else:
                monkeypatch.setattr("santa_hf.integration.masks._on_host", lambda _: True)
            with _Operations() as operations:
                mask = santa_mask(**step)
            assert operations.reads == 0
            assert operations.count <= most
            return mask

        model = tiny.use(tiny.shared(family), "santa", samples=8)
        decode(model, batch, cache, monkeypatch, watch)
    assert santa_hf.stats(model).total.sampled
