"""`generate_batch`: every sequence gets the tokens that `generate` gives it alone, in float64."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching import continuous_api

import santa_hf
from santa_hf.integration import attention, paged
from santa_hf.integration.compat import paged_layer, paged_storage
from santa_hf.integration.paged import PAGED, santa_paged_attention
from santa_hf.reference import in_order
from santa_hf.stats import count_value_rows

NEW_TOKENS = 20
PROMPTS = [row[0].tolist() for row in tiny.prompts(150, 37, 90, 200, 61)]
# Room for all prompts at once; by default, masks of 5.23 take 7 GB where layers slide.
SIZE = {"num_blocks": 64, "max_batch_tokens": 1024}
# The experts of gpt_oss have no float64.
FAMILIES = [family for family in tiny.FAMILIES if family != "gpt_oss"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA GPU or TRITON_INTERPRET=1, see test_kernels_interpreted.py",
)
_PAGES = "page_size" in inspect.signature(ContinuousBatchingConfig).parameters  # 5.23


def alone(
    model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[list[int]]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # Without a mask, generate would hide padding tokens, which are tokens like others here.
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens}
        tokens = model.generate(ids, do_sample=False, **settings)
        out.append(tokens[0, len(prompt) :].tolist())
    return out


def together(
    model: PreTrainedModel,
    prompts: list[list[int]] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    **changes: Any,
) -> list[list[int]]:
    out = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(**{**SIZE, **changes}),
    )
    assert all(output.error is None for output in out.values())
    return [out[name].generated_tokens for name in sorted(out)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_generate(family: str) -> None:
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8)
    expected = alone(model)
    santa_hf.reset_stats(model)
    assert together(model) == expected
    counters = santa_hf.stats(model).total
    draws = tiny.LAYERS * tiny.HEADS * 8 * len(PROMPTS) * (NEW_TOKENS - 1)
    assert counters.samples == draws
    assert not counters.fallbacks
    assert model.config._attn_implementation == "santa"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefill_chunks_and_decode_steps_in_one_step(family: str) -> None:
    """With room for 70 tokens a step, prompts come in pieces while other sequences decode."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8, seed=3)
    expected = alone(model)
    santa_hf.reset_stats(model)
    assert together(model, max_batch_tokens=70) == expected
    counters = santa_hf.stats(model).total
    assert counters.multi_token > tiny.LAYERS * len(PROMPTS)
    # Some steps were mixed: there are more of them than it takes to decode the last sequence.
    assert counters.sampled > tiny.LAYERS * (NEW_TOKENS - 1)


def test_prompts_of_one_token() -> None:
    """Their prefill has one query token, and nothing to read from the cache."""
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=8)
    prompts = [[5], [71], [40]]
    expected = alone(model, prompts)
    santa_hf.reset_stats(model)
    assert together(model, prompts) == expected
    draws = tiny.LAYERS * tiny.HEADS * 8 * len(prompts) * (NEW_TOKENS - 1)
    assert santa_hf.stats(model).total.samples == draws


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_pieces_of_a_prompt_that_are_one_token_long(family: str) -> None:
    """They look like decode steps, and are dense like the rest of the prompt."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=4)
    prompts = [row[0].tolist() for row in tiny.prompts(71, 141, 70, 9)]
    expected = alone(model, prompts)
    santa_hf.reset_stats(model)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert together(model, [prompt], max_batch_tokens=70) == [tokens]
    assert together(model, prompts, max_batch_tokens=70) == expected
    draws = tiny.LAYERS * tiny.HEADS * 4 * len(prompts) * (NEW_TOKENS - 1)
    assert santa_hf.stats(model).total.samples == 2 * draws


def test_shared_prefixes_are_those_of_prompts() -> None:
    """A prompt finds what another prompt left in the cache, of which one token may remain to prefill,
    but not what was generated: keys and values of sampled tokens are others."""
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=4)
    prompt = tiny.prompts(65)[0][0].tolist()
    (answer,) = alone(model, [prompt])
    second_turn = prompt + answer + prompt[:30]
    prompts = [prompt, prompt, second_turn, second_turn[:97], prompt[:64]]
    expected = alone(model, prompts)
    size = {"page_size": 32} if _PAGES else {"block_size": 32}
    assert together(model, prompts, max_batch_tokens=70, **size) == expected
    if _PAGES:
        assert together(model, prompts, max_requests_per_batch=1, **size) == expected


def test_a_sampled_sequence_forks_at_its_prompt() -> None:
    """The last token of the prompt, which each of them prefills for itself, is dense."""
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=4)
    out = model.generate_batch(
        PROMPTS[:2],
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=True, top_k=1, num_return_sequences=3,
            eos_token_id=-1, pad_token_id=0,
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64),
    )  # fmt: skip
    counters = santa_hf.stats(model).total
    assert counters.samples == tiny.LAYERS * tiny.HEADS * 4 * 6 * (NEW_TOKENS - 1)
    expected = alone(model, PROMPTS[:2])
    seen = [output.generated_tokens for output in out.values()]
    returned = 3 if _PAGES else 1  # 5.17 returns the parent alone
    assert [seen.count(tokens) for tokens in expected] == [returned, returned]
    assert len(seen) == 2 * returned


@pytest.mark.parametrize("blocks", [8, 10])
def test_evicted_requests_are_fed_again_as_they_were(blocks: int) -> None:
    """Without room in the cache a request starts over: its prompt dense, what it generated sampled."""
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=4)
    prompts = [row[0].tolist() for row in tiny.prompts(60, 50, 70, 40)]
    expected = alone(model, prompts, 60)
    santa_hf.reset_stats(model)
    size = {"page_size": 32} if _PAGES else {"block_size": 32}
    for sharing in (False, True):
        settings = {"num_blocks": blocks, "allow_block_sharing": sharing, **size}
        assert together(model, prompts, 60, **settings) == expected
    draws = tiny.LAYERS * tiny.HEADS * 4 * len(prompts) * 59
    assert santa_hf.stats(model).total.samples > 2 * draws  # there were evictions


@pytest.mark.parametrize(
    "settings",
    [{"use_async_batching": True}, {"max_batch_tokens": -1}],
    ids=str,
)
def test_a_manager_that_fails_leaves_the_model_as_it_was(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.use(tiny.build("llama"), "santa")
    with pytest.raises(Exception):  # noqa: B017, PT011 - Transformers' own
        together(model, **settings)
    assert model.config._attn_implementation == "santa"

    def fail(*_: Any) -> None:
        raise RuntimeError("no generation config")

    monkeypatch.setattr(model, "_get_logits_processor", fail, raising=True)
    with pytest.raises(RuntimeError, match="no generation config"):
        together(model)
    assert model.config._attn_implementation == "santa"


def test_flash_attention_that_is_there_is_not_switched_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (2, 3):
        name = f"is_flash_attn_{version}_available"
        if hasattr(continuous_api, name):
            monkeypatch.setattr(continuous_api, name, lambda **_: True)
    model = tiny.use(tiny.build("llama"), "santa", samples=8)
    seen = []
    monkeypatch.setattr(
        model, "set_attn_implementation", _recorded(model.set_attn_implementation, seen)
    )
    together(model, PROMPTS[:1])
    assert seen == [PAGED, "santa"]
    assert santa_hf.stats(model).total.sampled == tiny.LAYERS * (NEW_TOKENS - 1)


def _recorded(call: Callable[[str], None], seen: list[str]) -> Callable[[str], None]:
    def recorded(name: str) -> None:
        seen.append(name)
        call(name)

    return recorded


class Copies(TorchDispatchMode):
    """Counts what operators make of tensors that share the memory of `storages`, and write there."""

    def __init__(self, *storages: torch.Tensor) -> None:
        super().__init__()
        self.owned = {_memory(storage) for storage in storages}
        self.read = self.written = 0  # elements

    def __torch_dispatch__(self, call: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        given = {_memory(x) for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if given & self.owned:
            self.read += sum(x.numel() for x in made if _memory(x) not in given)
        if call == torch.ops.aten.index_copy_.default and _memory(args[0]) in self.owned:
            self.written += args[3].numel()
        return out


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@kernels
@pytest.mark.parametrize("estimator", ["systematic", "dense"])
def test_decode_steps_copy_no_keys_and_values(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On full and on sliding layers they write the new tokens, and the kernels read the cache."""
    steps = 0

    def watched(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        if query.shape[2] != len(PROMPTS):  # a prefill
            return santa_paged_attention(module, query, *args, **kwargs)
        steps += 1
        with Copies(*paged_storage(kwargs["cache"], module.layer_idx)) as copies:
            out = santa_paged_attention(module, query, *args, **kwargs)
        assert copies.read == 0
        assert copies.written == 2 * len(PROMPTS) * tiny.KV_HEADS * 16
        return out

    monkeypatch.setitem(AttentionInterface._global_mapping, PAGED, watched)
    model = tiny.use(tiny.build("gemma3"), "santa", samples=8, estimator=estimator, kernel="prop")
    together(model.to(DEVICE), new_tokens=3, max_batch_tokens=600)
    assert steps == tiny.LAYERS * 2


@kernels
@pytest.mark.parametrize("santa", [{}, {"min_context": 100}, {"estimator": "dense"}], ids=str)
def test_what_is_read_in_the_cache_is_what_would_be_gathered(
    santa: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, beside prefills too, and the tokens are those of `generate`."""
    attend, rows_seen = paged.santa_attention, set()

    def compared(
        module: Any, query: Any, key: Any, value: Any, mask: Any, rows: Any = None, **kwargs: Any
    ) -> Any:
        out = attend(module, query, key, value, mask, rows=rows, **kwargs)
        if rows is not None:
            rows_seen.add(len(rows))
            states = in_order(key, rows), in_order(value, rows)
            assert torch.equal(out[0], attend(module, query, *states, mask, **kwargs)[0])
        return out

    monkeypatch.setattr(paged, "santa_attention", compared)
    model = tiny.use(tiny.build("gemma3").to(DEVICE), "santa", samples=8, kernel="prop", **santa)
    prompts = [row[0].tolist() for row in tiny.prompts(30, 130, 141)]
    out = together(model, prompts, new_tokens=5, max_batch_tokens=150)
    assert rows_seen == {1, 2, 3}
    if DEVICE == "cpu":
        assert out == alone(model, prompts, new_tokens=5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_that_cache_alike_share_the_plan_of_a_step(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made, calls, groups = paged._make_plan, [], [], set()

    def counted(*args: Any) -> Any:
        made.append(None)
        return make(*args)

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        groups.add(paged_layer(kwargs["cache"], args[0].layer_idx, kwargs)[0])
        return santa_paged_attention(*args, **kwargs)

    monkeypatch.setattr(paged, "_make_plan", counted)
    monkeypatch.setitem(AttentionInterface._global_mapping, PAGED, watched)
    together(tiny.use(tiny.shared(family), "santa", samples=4), max_batch_tokens=150)
    assert len(made) / len(groups) == len(calls) / tiny.LAYERS > NEW_TOKENS
    assert family != "llama" or len(groups) == 1


def test_a_fallback_attends_to_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.shared("gemma3", torch.float64)
    expected = alone(tiny.use(model, "sdpa"))
    monkeypatch.setattr(attention, "_why_not_sampled", lambda *_: "a test says so")
    assert together(tiny.use(model, "santa", samples=4)) == expected
    calls = tiny.LAYERS * (NEW_TOKENS - 1)
    assert santa_hf.stats(model).total.fallbacks == {"a test says so": calls}


def test_value_rows_are_counted_as_alone() -> None:
    model = tiny.use(tiny.shared("gemma3", torch.float64), "santa", samples=4, min_context=60)
    seen = []
    for generate in (alone, together):
        santa_hf.reset_stats(model)
        with count_value_rows():
            generate(model)
        counters = santa_hf.stats(model).total
        seen.append((counters.samples, counters.rows_read, counters.rows_visible))
    assert seen[0] == seen[1]
    assert seen[0][1] > 0


def test_seeds_and_budgets_reach_it() -> None:
    model = tiny.shared("llama", torch.float64)
    seen = [
        together(tiny.use(model, "santa", **budget))
        for budget in ({"samples": 4}, {"samples": 4, "seed": 1}, {"estimator": "dense"})
    ]
    assert seen[0] != seen[1]
    assert seen[2] == alone(tiny.use(model, "sdpa"))
    tiny.use(model, "santa", samples=4, min_context=120)
    assert together(model) == alone(model)


def test_sinks_are_heard() -> None:
    model = tiny.shared("gpt_oss")
    dense = together(tiny.use(model, "santa", estimator="dense"))
    assert dense == alone(tiny.use(model, "eager"))


def test_other_attentions_are_left_to_transformers() -> None:
    model = tiny.shared("llama", torch.float64)
    expected = alone(tiny.use(model, "sdpa"))
    assert together(tiny.use(model, "sdpa"), max_batch_tokens=400) == expected
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The kernels draw there: dense as SDPA, and sampled near what the reference draws."""
    model = tiny.build("llama").cuda()
    assert together(tiny.use(model, "santa", estimator="dense")) == alone(tiny.use(model, "sdpa"))
    seen = [
        together(tiny.use(model, "santa", samples=256, kernel=kernel))
        for kernel in ("prop", "reference")
    ]
    same = sum(a == b for rows in zip(*seen, strict=True) for a, b in zip(*rows, strict=True))
    assert same > NEW_TOKENS * len(PROMPTS) / 2


@pytest.mark.gpu
def test_decode_steps_do_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def watched(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += query.shape[2] == len(PROMPTS)
        if query.shape[2] != len(PROMPTS) or calls <= 5 * tiny.LAYERS:  # a prefill, or it compiles
            return santa_paged_attention(module, query, *args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return santa_paged_attention(module, query, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setitem(AttentionInterface._global_mapping, PAGED, watched)
    together(tiny.use(tiny.build("gemma3").cuda(), "santa", samples=16, strict=True))
    assert calls == tiny.LAYERS * (NEW_TOKENS - 1)


def test_what_it_cannot_do_is_said() -> None:
    model = tiny.use(tiny.build("llama"), PAGED)
    with pytest.raises(ValueError, match="needs the paged cache"):
        model(torch.tensor([PROMPTS[0]]))
    layer = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), None
    with pytest.raises(ValueError, match="needs the paged cache of continuous batching, got"):
        santa_paged_attention(layer, *x, cache=DynamicCache())
