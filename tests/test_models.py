"""With the `dense` estimator, "santa" computes what the model computes without it.

Every supported family, in every way that generation calls attention: logits of each step within 1e-5 in
float32, and the same tokens. Sampled with a large budget, the same cases come close to the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import santa_hf
import tiny
import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, StaticCache

NEW_TOKENS = 5
ALONE = {"input_ids": tiny.prompts(150)[0]}
PADDED = tiny.left_padded(tiny.prompts(150, 137, 60))
# The suffix has been seen before, so that prompt lookup finds candidates.
REPEATING = {"input_ids": torch.cat([ALONE["input_ids"], ALONE["input_ids"][:, 100:130]], 1)}

Result = tuple[torch.Tensor, torch.Tensor]


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: object) -> Result:
    """Tokens (B, n), and the raw logits of each new token (B, steps, vocabulary)."""
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    out = model.generate(
        **inputs, **kwargs, output_logits=True, return_dict_in_generate=True, use_cache=True
    )
    return out.sequences, torch.stack(out.logits, 1)


def sampled_sequences(model: PreTrainedModel) -> Result:
    torch.manual_seed(5)
    return generate(model, PADDED, do_sample=True, num_return_sequences=2)


def assisted(model: PreTrainedModel) -> Result:
    return generate(model, ALONE, assistant_model=assistant())


@lru_cache(maxsize=1)
def assistant() -> PreTrainedModel:
    model = tiny.build("llama", num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    return model


def turns(model: PreTrainedModel, cache: object) -> Result:
    """Two turns on one cache: the second prefills its few tokens behind what the first left."""
    tokens, first = generate(model, ALONE, past_key_values=cache)
    turn = {"input_ids": torch.cat([tokens, tiny.prompts(70, seed=4)[0]], 1)}
    tokens, second = generate(model, turn, past_key_values=cache)
    return tokens, torch.cat([first, second], 1)


CASES: dict[str, Callable[[PreTrainedModel], Result]] = {
    "alone": lambda model: generate(model, ALONE),
    "padded": lambda model: generate(model, PADDED),
    "static": lambda model: generate(model, ALONE, cache_implementation="static"),
    "static padded": lambda model: generate(model, PADDED, cache_implementation="static"),
    # Without the model's configuration the cache keeps every key, also of sliding layers.
    "full cache": lambda model: generate(model, PADDED, past_key_values=DynamicCache()),
    "beams": lambda model: generate(model, PADDED, num_beams=3),
    "num_return_sequences": sampled_sequences,
    "prompt lookup": lambda model: generate(model, REPEATING, prompt_lookup_num_tokens=4),
    "assisted": assisted,
    "turns": lambda model: turns(model, DynamicCache(config=model.config)),
    "turns static": lambda model: turns(model, StaticCache(config=model.config, max_cache_len=256)),
    "chunked prefill": lambda model: generate(model, PADDED, prefill_chunk_size=64),
}


@lru_cache(maxsize=None)
def without_santa(family: str, case: str) -> Result:
    return CASES[case](tiny.use(tiny.shared(family), tiny.baseline(family)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dense_equals_the_model_without_santa(family: str, case: str) -> None:
    tokens, logits = without_santa(family, case)
    model = tiny.use(tiny.shared(family), "santa", estimator="dense")
    santa_tokens, santa_logits = CASES[case](model)
    torch.testing.assert_close(santa_logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(santa_tokens, tokens)

    counters = santa_hf.stats(model).total
    assert counters.multi_token > 0
    assert counters.sampled == 0
    assert not counters.fallbacks
    if case not in ("prompt lookup", "assisted"):  # these verify several tokens at a time
        assert counters.dense > 0


class Force(LogitsProcessor):
    """Makes generation emit given tokens (B, n), whatever the logits are."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = self.tokens[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        pytest.param(ALONE, {}, id="alone"),
        pytest.param(PADDED, {}, id="padded"),
        pytest.param(ALONE, {"cache_implementation": "static"}, id="static"),
        pytest.param(PADDED, {"cache_implementation": "static"}, id="static padded"),
        pytest.param(PADDED, {"past_key_values": None}, id="full cache"),
        pytest.param(PADDED, {"prefill_chunk_size": 64}, id="chunked prefill"),
    ],
)
@pytest.mark.parametrize("family", tiny.SAMPLED)
def test_many_samples_come_close_to_dense(
    family: str, inputs: dict[str, torch.Tensor], kwargs: dict[str, object]
) -> None:
    """A key that should not be drawn, or one that cannot be, moves these logits by more than 0.1."""
    model = tiny.shared(family)
    logits = {}
    tokens = None
    for samples in (None, 64, 8192):
        if "past_key_values" in kwargs:
            kwargs = {"past_key_values": DynamicCache()}
        if tokens is None:
            tokens, logits[samples] = generate(tiny.use(model, "sdpa"), inputs, **kwargs)
        else:
            tiny.use(model, "santa", samples=samples, strict=True)
            _, logits[samples] = generate(model, inputs, logits_processor=[Force(tokens)], **kwargs)
    # The first token comes out of the prefill, which is exact.
    torch.testing.assert_close(logits[64][:, 0], logits[None][:, 0], rtol=1e-5, atol=1e-5)
    few, many = (
        (logits[samples] - logits[None])[:, 1:].square().mean().sqrt() for samples in (64, 8192)
    )
    assert many < 0.02
    assert few > 4 * many


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("santa", [{"estimator": "dense"}, {}], ids=["dense", "sampled"])
def test_output_attentions(family: str, implementation: str, santa: dict[str, object]) -> None:
    """The weights of every layer and step are those of the eager model, and the logits too."""
    model = tiny.shared(family)
    outs = []
    for attention in ("eager", "santa"):
        tiny.use(model, attention, **(santa if attention == "santa" else {}))
        outs.append(
            model.generate(
                **PADDED,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                cache_implementation=implementation,
                output_attentions=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    eager, out = outs
    assert torch.equal(out.sequences, eager.sequences)
    torch.testing.assert_close(
        torch.stack(out.logits), torch.stack(eager.logits), rtol=1e-5, atol=1e-5
    )
    assert len(out.attentions) == NEW_TOKENS
    for step, reference in zip(out.attentions, eager.attentions, strict=True):
        assert len(step) == tiny.LAYERS
        for weights, expected in zip(step, reference, strict=True):
            # Rows of padding attend to nothing, and what stands there is read by nobody.
            rows = PADDED["attention_mask"].bool() if weights.shape[2] > 1 else ...
            weights, expected = weights.transpose(1, 2)[rows], expected.transpose(1, 2)[rows]
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
