"""Sampled generation: it does sample, counts what it did, and sees the mask."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.generation.utils import DeferredStopCheck
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)

import santa_hf
from santa_hf import functional
from santa_hf.integration.masks import santa_mask

NEW_TOKENS = 6
DECODE_STEPS = NEW_TOKENS - 1  # the first token comes out of the prefill
ROWS = tiny.prompts(150, 137, 60)
PADDED = tiny.left_padded(ROWS)
REASON = "the model is in training mode"


def generate(model: PreTrainedModel, **kwargs: object) -> torch.Tensor:
    """Raw logits of each new token of the padded batch: (B, NEW_TOKENS, vocabulary)."""
    out = model.generate(
        **{**PADDED, "max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("estimator", ["systematic", "stratified", "multinomial"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_samples_and_counts(family: str, estimator: str, cache: str) -> None:
    model = tiny.use(tiny.shared(family), "santa", samples=24, estimator=estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of, the prefill least of all
        with santa_hf.count_value_rows():
            sampled = generate(model, cache_implementation=cache)
    counters = santa_hf.stats(model)
    calls = tiny.LAYERS * DECODE_STEPS
    assert counters.total.sampled == calls
    assert counters.total.samples == calls * 24 * tiny.HEADS * len(ROWS)
    assert counters.total.multi_token == tiny.LAYERS
    assert counters.total.dense == 0
    assert not counters.total.fallbacks
    assert list(counters.layers) == list(range(tiny.LAYERS))
    assert all(layer.sampled == DECODE_STEPS for layer in counters.layers.values())
    # Two heads with 24 draws each share a KV head.
    most = calls * len(ROWS) * tiny.KV_HEADS * 48
    assert 0 < counters.total.rows_read <= most
    assert 0 < counters.total.share_of_rows_read < 1

    exact = generate(tiny.use(model, tiny.baseline(family)), cache_implementation=cache)
    torch.testing.assert_close(sampled[:, 0], exact[:, 0], rtol=1e-5, atol=1e-5)
    assert (sampled[:, 1] - exact[:, 1]).abs().amax(-1).min() > 1e-2  # in every row

    santa_hf.reset_stats(model)
    assert santa_hf.stats(model).total.sampled == 0


def test_steps_that_cannot_be_sampled_are_exact_and_said_to_be() -> None:
    model = tiny.use(tiny.build("llama"), "santa", samples=8).train()
    with pytest.warns(UserWarning, match=REASON) as caught:
        fallen_back = generate(model, max_new_tokens=2 * NEW_TOKENS)[:, :NEW_TOKENS]
    assert len([w for w in caught if "santa_hf" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, max_new_tokens=2)
    counters = santa_hf.stats(model).total
    steps = 2 * NEW_TOKENS - 1 + 1
    assert counters.fallbacks == {REASON: tiny.LAYERS * steps}
    assert counters.sampled == counters.samples == 0
    assert counters.multi_token == 2 * tiny.LAYERS
    assert REASON in str(santa_hf.stats(model))
    exact = generate(tiny.use(model, "sdpa"))
    torch.testing.assert_close(fallen_back, exact, rtol=1e-5, atol=1e-5)

    tiny.use(model, "santa", samples=8, strict=True)
    with pytest.raises(NotImplementedError, match=REASON):
        generate(model)
    generate(model, max_new_tokens=1)  # the prefill alone is allowed


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_differ_as_configured(family: str) -> None:
    model = tiny.use(
        tiny.shared(family),
        "santa",
        samples=16,
        layers={0: {"estimator": "dense"}, 2: {"samples": 40, "estimator": "multinomial"}},
    )
    generate(model)
    layers = santa_hf.stats(model).layers
    draws = DECODE_STEPS * tiny.HEADS * len(ROWS)
    assert (layers[0].dense, layers[0].sampled) == (DECODE_STEPS, 0)
    assert (layers[1].dense, layers[1].samples) == (0, 16 * draws)
    assert (layers[2].dense, layers[2].samples) == (0, 40 * draws)


def test_rows_with_little_context_are_dense() -> None:
    """Row by row: those below min_context are exact, the others sampled, and only these count."""
    model = tiny.shared("llama")
    exact = generate(tiny.use(model, "sdpa"), max_new_tokens=2)
    tiny.use(model, "santa", samples=16, min_context=139)
    with santa_hf.count_value_rows():
        sampled = generate(model, max_new_tokens=2)
    difference = (sampled - exact)[:, 1].abs().amax(-1)
    assert difference[0] > 1e-2  # 151 visible keys
    torch.testing.assert_close(sampled[1:], exact[1:], rtol=1e-5, atol=1e-5)  # 138 and 61
    counters = santa_hf.stats(model).total
    assert counters.samples == tiny.LAYERS * 16 * tiny.HEADS
    assert counters.rows_visible == tiny.LAYERS * 151 * tiny.KV_HEADS
    assert 0 < counters.rows_read <= tiny.LAYERS * 16 * tiny.HEADS

    # In a static cache the slots are there, but what is visible counts.
    for settings in ({}, {"cache_implementation": "static", "max_new_tokens": 60}):
        santa_hf.reset_stats(model)
        tiny.use(model, "santa", samples=16, min_context=180)
        with santa_hf.count_value_rows():
            generate(model, **settings)
        counters = santa_hf.stats(model).total
        steps = settings.get("max_new_tokens", NEW_TOKENS) - 1
        assert counters.dense + counters.sampled == tiny.LAYERS * steps
        # The longest row sees 180 keys at its 30th step, counted from one.
        assert counters.sampled == tiny.LAYERS * max(0, steps - 29)
    santa_hf.reset_stats(model)
    generate(tiny.use(model, "santa", samples=16, min_context=1000))
    counters = santa_hf.stats(model).total
    assert (counters.sampled, counters.dense) == (0, tiny.LAYERS * DECODE_STEPS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_is_dense_in_pieces_of_one_token(family: str, cache: str) -> None:
    """The last piece of a chunked prefill may look like a decode step."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=4)
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    for length, pieces in ((65, 64), (129, 64), (5, 1)):
        prompt = tiny.prompts(length)[0]
        whole = model.generate(prompt, **settings)
        santa_hf.reset_stats(model)
        assert torch.equal(model.generate(prompt, **settings, prefill_chunk_size=pieces), whole)
        counters = santa_hf.stats(model).total
        assert counters.sampled == tiny.LAYERS * 11
        assert counters.multi_token == tiny.LAYERS * -(-length // pieces)


def test_a_prompt_of_one_token_is_dense() -> None:
    """The first generated token is, as after any prompt; with sinks that shows."""
    for family in ("llama", "gpt_oss"):
        model = tiny.use(tiny.shared(family), "santa", samples=4)
        logits = generate(model, input_ids=torch.tensor([[7]]), attention_mask=None)
        counters = santa_hf.stats(model).total
        assert counters.multi_token == tiny.LAYERS
        assert counters.sampled == tiny.LAYERS * DECODE_STEPS
        exact = model(torch.tensor([[7]]).repeat(1, 2)).logits[:, :1]
        torch.testing.assert_close(logits[:, :1], exact, rtol=1e-4, atol=1e-4)


def test_one_token_after_a_saved_cache_is_a_decode_step() -> None:
    """`generate` continues by the last token that it generated: the tokens of a run without a break."""
    model = tiny.use(tiny.shared("llama", torch.float64), "santa", samples=4)
    whole = model.generate(ROWS[2], max_new_tokens=20, do_sample=False)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ROWS[2], max_new_tokens=8, **settings)
    for tokens in (first.sequences, first.sequences[:, -1:]):
        cache = copy.deepcopy(first.past_key_values)
        mask = torch.ones_like(first.sequences)
        rest = model.generate(
            tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **settings
        )
        assert torch.equal(rest.sequences[:, -12:], whole[:, -12:])


@pytest.mark.parametrize("padding", [None, 20, 33, 64])
def test_the_mask_of_a_static_step_is_that_of_sdpa(padding: int | None) -> None:
    attention_mask = None
    if padding is not None:
        attention_mask = torch.ones(3, padding, dtype=torch.bool)
        attention_mask[1, :7] = attention_mask[2, :19] = False
    for position in (0, 19, 32, 63):
        step = {
            "batch_size": 3,
            "q_length": 1,
            "kv_length": 64,
            "q_offset": torch.tensor(position),
            "kv_offset": 0,
            "mask_function": causal_mask_function,
            "attention_mask": attention_mask,
            "allow_is_causal_skip": False,
        }
        assert torch.equal(santa_mask(**step), sdpa_mask(**step))


def test_speculation_is_dense_and_silent() -> None:
    """Verification of several tokens is dense by design: counted, without a warning, under strict."""
    model = tiny.use(tiny.shared("llama"), "santa", samples=16, strict=True)
    prompt = torch.cat([ROWS[0], ROWS[0][:, 100:130]], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, input_ids=prompt, attention_mask=None, prompt_lookup_num_tokens=4)
    assert santa_hf.stats(model).total.multi_token > tiny.LAYERS
    assert not santa_hf.stats(model).total.fallbacks


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="num_return_sequences"),
    ],
)
def test_every_beam_and_sequence_is_sampled(kwargs: dict[str, object]) -> None:
    model = tiny.use(tiny.shared("qwen2"), "santa", samples=16)
    generate(model, **kwargs)
    counters = santa_hf.stats(model).total
    assert counters.samples == tiny.LAYERS * DECODE_STEPS * 16 * tiny.HEADS * 3 * len(ROWS)


def test_torch_generator_is_not_consumed() -> None:
    model = tiny.use(tiny.shared("llama"), "santa", samples=16)
    before = torch.get_rng_state()
    generate(model)
    assert torch.equal(torch.get_rng_state(), before)


def padded_and_alone(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    padded = generate(model)
    alone = [generate(model, input_ids=row, attention_mask=None) for row in ROWS]
    return padded, torch.cat(alone)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_is_not_attended_to(family: str) -> None:
    """A padded batch equals its rows alone, in the prefill and in every decode step."""
    model = tiny.use(tiny.shared(family), "santa", estimator="dense")
    padded, alone = padded_and_alone(model)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_is_attended_to_without_the_mask_function(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the registered mask function is for, and proof that the test above can fail."""
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "santa")
    model = tiny.use(tiny.shared(family), "santa", estimator="dense")
    padded, alone = padded_and_alone(model)
    torch.testing.assert_close(padded[0], alone[0], rtol=1e-4, atol=1e-4)  # has no padding
    assert (padded[1:] - alone[1:]).abs().max() > 0.1


def test_only_a_gpu_may_stop_late() -> None:
    """By the rules that Transformers has for MPS, and as long as it is asked for."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    kept = StaticCache(config=tiny.shared("llama").config, max_cache_len=8)

    def allowed(device: torch.device, cache: Cache | None = None, returned: bool = False) -> bool:
        return DeferredStopCheck.is_supported(device, cache, returned, is_assistant=False)

    with santa_hf.deferred_stopping(), santa_hf.deferred_stopping():
        assert allowed(cuda)
        assert allowed(cuda, kept)
        assert not allowed(cuda, kept, True)  # cannot be cropped
        assert not DeferredStopCheck.is_supported(cuda, None, False, is_assistant=True)
        assert not allowed(cpu)
    assert not allowed(cuda)


class _Event:
    """A torch.Event of a device that is never behind."""

    def __init__(self, **_: object) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stopping_late_undoes_one_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and the cache that is returned, in which rows were cropped in place."""
    model = tiny.use(tiny.shared(family, torch.float64), "santa", samples=8)
    settings = {**PADDED, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(**settings).sequences
    for end in (None, free[:, 165].tolist()):
        settings["eos_token_id"] = end
        santa_hf.reset_stats(model)
        waited = model.generate(**settings)
        steps = santa_hf.stats(model).total.sampled
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Event", _Event)
            patch.setattr(DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: True))
            santa_hf.reset_stats(model)
            late = model.generate(**settings)
        undone = tiny.LAYERS if end else 0
        assert santa_hf.stats(model).total.sampled == steps + undone
        assert torch.equal(late.sequences, waited.sequences)
        assert (late.sequences.shape[1] < free.shape[1]) == bool(end)
        for one, other in zip(
            late.past_key_values.layers, waited.past_key_values.layers, strict=True
        ):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)


def test_a_cpu_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not even be possible to import there."""
    monkeypatch.setattr(functional, "_kernels", lambda: pytest.fail("imports the kernels"))
    (prompt,) = tiny.prompts(9)
    for estimator in ("systematic", "dense"):
        model = tiny.use(tiny.build("llama"), "santa", samples=4, estimator=estimator)
        model.generate(prompt, max_new_tokens=3, do_sample=False)
