"""With the `dense` estimator, "santa" computes what the model computes without it.

Every supported family, in every way that generation calls attention: logits of each step within 1e-5 in
float32, and the same tokens. Sampled with a large budget, the same cases come close to the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import tiny
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import santa_hf

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


@cache
def assistant() -> PreTrainedModel:
    model = tiny.build("llama", num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    return model


def turns(model: PreTrainedModel, kind: type[Cache], **kwargs: object) -> Result:
    """Two turns on one cache: the second prefills its few tokens behind what the first left."""
    cache = kind(config=model.config, **kwargs)
    tokens, first = generate(model, ALONE, past_key_values=cache)
    turn = {"input_ids": torch.cat([tokens, tiny.prompts(70, seed=4)[0]], 1)}
    tokens, second = generate(model, turn, past_key_values=cache)
    return tokens, torch.cat([first, second], 1)


CASES: dict[str, Callable[..., Result]] = {
    "alone": partial(generate, inputs=ALONE),
    "padded": partial(generate, inputs=PADDED),
    "static": partial(generate, inputs=ALONE, cache_implementation="static"),
    "static padded": partial(generate, inputs=PADDED, cache_implementation="static"),
    # Made without the model's configuration, this keeps every key, also in sliding layers.
    "full cache": lambda model, **kwargs: generate(
        model, PADDED, past_key_values=DynamicCache(), **kwargs
    ),
    "chunked prefill": partial(generate, inputs=PADDED, prefill_chunk_size=64),
    "beams": partial(generate, inputs=PADDED, num_beams=3),
    "num_return_sequences": sampled_sequences,
    "prompt lookup": partial(generate, inputs=REPEATING, prompt_lookup_num_tokens=4),
    "assisted": lambda model: generate(model, ALONE, assistant_model=assistant()),
    "turns": partial(turns, kind=DynamicCache),
    "turns static": partial(turns, kind=StaticCache, max_cache_len=256),
}
SINGLE_TOKEN = ("alone", "padded", "static", "static padded", "full cache", "chunked prefill")


@cache
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


@pytest.mark.parametrize("case", SINGLE_TOKEN)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampling_error_vanishes(family: str, case: str) -> None:
    """It falls as 1/S: no key is drawn that should not be, and none is left out."""
    tokens, exact = without_santa(family, case)
    model = tiny.shared(family)
    error = {}
    for samples in (64, 1024):
        tiny.use(model, "santa", samples=samples, strict=True)
        _, logits = CASES[case](model, logits_processor=[tiny.Force(tokens)])
        # The first token comes out of the prefill, which is exact.
        torch.testing.assert_close(logits[:, 0], exact[:, 0], rtol=1e-5, atol=1e-5)
        error[samples] = float((logits - exact)[:, 1:].square().mean().sqrt())
    assert error[1024] < 0.08
    assert error[64] > 5 * error[1024]


@pytest.mark.filterwarnings("ignore:santa_hf")
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
    fallbacks = sum(santa_hf.stats(model).total.fallbacks.values())
    assert fallbacks == (0 if santa else tiny.LAYERS * (NEW_TOKENS - 1))
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
