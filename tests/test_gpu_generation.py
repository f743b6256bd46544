"""Generation on a GPU: the kernels draw what the reference draws, in eager and in CUDA graphs, at every
step anew, without waiting for the device and without compiling again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, PreTrainedModel, StoppingCriteria
from transformers.generation.utils import DeferredStopCheck
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import santa_hf
from santa_hf import santa_decode
from santa_hf.integration.attention import santa_attention
from santa_hf.integration.cache import InPlaceLayer, InPlaceSlidingWindowLayer
from santa_hf.integration.masks import santa_mask

pytestmark = pytest.mark.gpu

NEW_TOKENS = 8
PADDED = tiny.left_padded(tiny.prompts(300, 260))
BETWEEN = 280  # of two rows with 300 and 260 visible keys, one is below it


def generate(model: PreTrainedModel, new_tokens: int = NEW_TOKENS, **kwargs: Any) -> torch.Tensor:
    """Raw logits of each new token of the padded batch: (B, new_tokens, vocabulary)."""
    inputs = {name: tensor.to(model.device) for name, tensor in PADDED.items()}
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize(
    ("family", "cache"),
    [(family, "static") for family in ("llama", "gemma3", "qwen2", "gpt_oss")]
    + [(family, "dynamic") for family in tiny.FAMILIES],
)
def test_kernels_draw_what_the_reference_draws(family: str, cache: str) -> None:
    """With a static cache, generate compiles the decode step and replays CUDA graphs: every replay
    draws what an eager step draws, which is fresh at each position."""
    model = tiny.build(family).cuda()
    vocabulary = torch.arange(NEW_TOKENS + 300, device="cuda") % 80 + 3
    force = [tiny.Force(vocabulary.expand(2, -1))]

    def logits(**kwargs: Any) -> torch.Tensor:
        return generate(model, cache_implementation=cache, logits_processor=force, **kwargs)[:, 1:]

    tiny.use(model, tiny.baseline(family))
    exact = logits(disable_compile=True)
    tiny.use(model, "santa", estimator="dense")
    torch.testing.assert_close(logits(), exact, rtol=1e-3, atol=1e-3)
    tiny.use(model, "santa", samples=16, strict=True)
    sampled = logits()
    # The reference reads the mask on the host, which a graph cannot.
    tiny.use(model, "santa", samples=16, strict=True, kernel="reference")
    reference = logits(disable_compile=True)
    noise = (sampled - exact).square().mean((0, 2)).sqrt()
    apart = (sampled - reference).square().mean((0, 2)).sqrt()
    assert noise.min() > 1e-2
    # The same draws, but where rounding moves one of 16 across a boundary; independent ones would be
    # apart by the noise times the square root of two.
    assert apart.square().mean() < 0.5 * noise.square().mean(), (apart, noise)
    assert (apart < 0.5 * noise).sum() > NEW_TOKENS // 2, (apart, noise)


@pytest.mark.parametrize("min_context", [0, BETWEEN])
def test_rows_below_min_context_are_exact_in_a_graph(min_context: int) -> None:
    model = tiny.build("llama").cuda()
    tiny.use(model, "sdpa")
    exact = generate(model, 2, cache_implementation="static", disable_compile=True)[:, 1]
    tiny.use(model, "santa", samples=16, min_context=min_context)
    for compiled in (False, True):
        logits = generate(model, 2, cache_implementation="static", disable_compile=not compiled)
        difference = (logits[:, 1] - exact).abs().amax(-1)
        assert difference[0] > 1e-2
        assert (difference[1] < 5e-4) == bool(min_context), difference


def test_rows_below_min_context_are_not_counted_as_sampled() -> None:
    """The device alone knows them; they are asked for when counters are read."""
    model = tiny.use(tiny.build("llama").cuda(), "santa", samples=16, min_context=BETWEEN)
    steps = 320
    generate(model, steps + 1)
    counters = santa_hf.stats(model).total
    # Row 0 sees 301 keys at its first step, row 1 261: it reaches 280 at its 20th.
    draws = tiny.LAYERS * 16 * tiny.HEADS
    assert (counters.sampled, counters.dense) == (tiny.LAYERS * steps, 0)
    assert counters.samples == draws * (steps + steps - 19)
    santa_hf.reset_stats(model)
    tiny.use(model, "santa", samples=16, min_context=310)
    generate(model, steps + 1)
    counters = santa_hf.stats(model).total
    # Row 0 reaches 310 at its 10th step, row 1 at its 50th.
    assert (counters.sampled, counters.dense) == (tiny.LAYERS * (steps - 9), tiny.LAYERS * 9)
    assert counters.samples == draws * (steps - 9 + steps - 49)


@pytest.mark.parametrize("estimator", ["systematic", "dense"])
def test_slots_that_are_not_filled_are_not_read(estimator: str) -> None:
    """7 of 8 slots of a static cache are empty, and poisoned."""
    filled, slots = 16384, 131072
    query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (
        torch.full((1, 8, slots, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    for states in (key, value):
        states[:, :, :filled].normal_()
    visible = (torch.arange(slots, device="cuda") < filled)[None, None, None]

    def step(n: int) -> torch.Tensor:
        return santa_decode(
            query, key[:, :, :n], value[:, :, :n], estimator=estimator, mask=visible[..., :n]
        )

    torch.testing.assert_close(step(slots), step(filled), rtol=1e-2, atol=1e-3)


def _never_waiting(call: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """`call` under a mode in which waiting for the GPU is an error, but for its first 100 calls:
    they compile."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= 100:
            return call(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.mark.parametrize("min_context", [0, BETWEEN])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eager_steps_never_wait_for_the_gpu(
    family: str, cache: str, min_context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_calls: list[int] = []
    update_calls: list[int] = []
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        "santa",
        _never_waiting(santa_attention, attention_calls),
    )
    for layer in (InPlaceLayer, InPlaceSlidingWindowLayer):
        monkeypatch.setattr(layer, "update", _never_waiting(layer.update, update_calls))
    mask_calls: list[int] = []
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        "santa",
        _never_waiting(santa_mask, mask_calls),
    )
    model = tiny.use(tiny.build(family).cuda(), "santa", samples=16, min_context=min_context)
    generate(model, 150, cache_implementation=cache, disable_compile=True)
    assert len(attention_calls) == 150 * tiny.LAYERS
    assert len(mask_calls) == 150 * (2 if family == "gemma3" else 1)
    if cache == "dynamic":
        assert len(update_calls) >= 150 * tiny.LAYERS
    # The mode does see a wait.
    with pytest.raises(RuntimeError, match="synchroniz"):
        _never_waiting(lambda: bool(torch.ones(1, device="cuda")), [1] * 100)()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_steps_never_wait_for_the_gpu(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the mask, which is made in eager, nor a replay of the graphs of the step."""
    mask_calls: list[int] = []
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        "santa",
        _never_waiting(santa_mask, mask_calls),
    )
    model = tiny.use(tiny.build(family).cuda(), "santa", samples=16)
    step_calls: list[int] = []
    compiled = model.get_compiled_call
    monkeypatch.setattr(
        model, "get_compiled_call", lambda *args: _never_waiting(compiled(*args), step_calls)
    )
    generate(model, 150, cache_implementation="static")
    assert len(step_calls) == 149
    assert len(mask_calls) == 150 * (2 if family == "gemma3" else 1)


class _Compilations(StoppingCriteria):
    """Counts, after every step, the graphs of Dynamo and the kernels of Triton compiled so far."""

    def __init__(self) -> None:
        import triton

        self.seen: list[tuple[int, int]] = []
        self.kernels = 0
        self.knobs = triton.knobs.runtime

    def compiled(self, **_: Any) -> None:
        self.kernels += 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seen.append((counters["stats"]["unique_graphs"], self.kernels))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@pytest.mark.parametrize("min_context", [0, BETWEEN])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_200_steps_compile_nothing_again(
    cache: str, min_context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    counters.clear()
    compilations = _Compilations()
    monkeypatch.setattr(compilations.knobs, "jit_post_compile_hook", compilations.compiled)
    # A head size of its own, so that kernels compile in this test and the count can be trusted.
    model = tiny.build("llama", head_dim=24 if cache == "static" else 40).cuda()
    tiny.use(model, "santa", samples=16, min_context=min_context)
    generate(model, 210, cache_implementation=cache, stopping_criteria=[compilations])
    seen = compilations.seen
    assert len(seen) == 210
    assert seen[-1] == seen[9], (seen[9], seen[-1])
    assert (seen[9][0] > 0) == (cache == "static"), seen[:10]
    assert seen[9][1] > 0 or min_context, seen[:10]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_stopping_a_step_late_changes_no_token(cache: str) -> None:
    """Nor the cache that is returned, and the last step of a cache that is full is not taken twice."""
    model = tiny.use(tiny.build("llama").cuda(), "santa", samples=16)
    inputs = {name: tensor.cuda() for name, tensor in PADDED.items()}
    settings = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": cache}
    free = model.generate(**inputs, **settings)
    # Ends that come apart, and before the last step.
    ends = [int(free[0, 300 + 11]), int(free[1, 300 + 23])]
    late: list[bool] = []
    finish = DeferredStopCheck.finish
    for end in (None, ends):
        settings["eos_token_id"] = end
        waited = model.generate(**inputs, **settings)
        with santa_hf.deferred_stopping(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeferredStopCheck, "finish", lambda s: late.append(True) or finish(s))
            assert torch.equal(model.generate(**inputs, **settings), waited)
        assert (waited.shape[1] < free.shape[1]) == (end is not None)
    assert len(late) == 2
    if cache == "dynamic":
        kept = []
        for context in (nullcontext(), santa_hf.deferred_stopping()):
            with context:
                out = model.generate(**inputs, **settings, return_dict_in_generate=True)
            kept.append(out.past_key_values.layers[1].keys)
        assert torch.equal(*kept)
    assert not DeferredStopCheck.is_supported(torch.device("cuda"), None, False, False)


@pytest.mark.parametrize("estimator", ["systematic", "stratified", "multinomial"])
def test_a_replayed_graph_draws_by_the_position_it_is_given(estimator: str) -> None:
    query, key, value = (
        torch.randn(2, h, n, 64, device="cuda") for h, n in ((4, 1), (2, 500), (2, 500))
    )
    position = torch.tensor([499, 480], device="cuda")
    mask = torch.ones(2, 1, 1, 500, dtype=torch.bool, device="cuda")
    mask[1, ..., :19] = False

    def step(position: torch.Tensor) -> torch.Tensor:
        return santa_decode(
            query, key, value, samples=16, estimator=estimator, mask=mask, position=position
        )

    step(position)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    seen = []
    for i in range(8):
        at = position + i
        out = compiled(at).clone()
        assert torch.equal(out, step(at))
        seen.append(out)
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
