"""A decode call that cannot be sampled is exact, counted, announced once, and refused under strict."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    DynamicCache,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
)

import santa_hf
from santa_hf.integration.attention import santa_attention

BATCH, LENGTH, DIM = 2, 150, 16


@pytest.fixture
def layer() -> torch.nn.Module:
    """The attention layer 1 of a new Llama."""
    return tiny.build("llama").model.layers[1].self_attn


def step(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One decode step: query, key, value, a mask that hides keys, and the positions."""
    mask = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    mask[1, ..., :20] = False
    return {
        "query": torch.randn(BATCH, tiny.HEADS, 1, DIM, dtype=dtype),
        "key": torch.randn(BATCH, tiny.KV_HEADS, LENGTH, DIM, dtype=dtype),
        "value": torch.randn(BATCH, tiny.KV_HEADS, LENGTH, DIM, dtype=dtype),
        "attention_mask": mask,
        "position_ids": torch.tensor([[LENGTH - 1], [LENGTH - 21]]),
    }


def exact(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Dense attention of the step, (B, q, H, D)."""
    out = scaled_dot_product_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        attn_mask=inputs["attention_mask"],
        enable_gqa=True,
    )
    return out.transpose(1, 2)


@dataclass
class Case:
    """What makes a step impossible to sample, by changes to the layer or to its inputs."""

    reason: str
    layer: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[dict[str, torch.Tensor]], dict[str, Any]] = lambda inputs: {}


def float_mask(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    hidden = ~inputs["attention_mask"]
    return {"attention_mask": torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)}


def head_mask(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    mask = inputs["attention_mask"].repeat(1, tiny.HEADS, 1, 1)
    mask[:, 0, :, 30:40] = False
    return {"attention_mask": mask}


CASES = {
    "training": Case("training mode", {"training": True}),
    "dropout": Case("training mode", inputs=lambda inputs: {"dropout": 1e-30}),
    "autograd": Case(
        "autograd needs a gradient",
        inputs=lambda inputs: {"key": inputs["key"].requires_grad_()},
    ),
    "float mask": Case("not a boolean row", inputs=float_mask),
    "a mask per head": Case("not a boolean row", inputs=head_mask),
    "no layer_idx": Case("no layer_idx", {"layer_idx": None}),
    "not causal": Case("not causal", {"is_causal": False}),
    "not causal, by keyword": Case("not causal", inputs=lambda inputs: {"is_causal": False}),
    "sliding without positions": Case(
        "sliding layer was called without position_ids",
        inputs=lambda inputs: {"sliding_window": LENGTH, "position_ids": None},
    ),
    "sharded heads": Case("heads of the layer are sharded", inputs=lambda inputs: half(inputs)),
    "attention weights": Case(
        "attention weights were asked for", inputs=lambda inputs: {"output_attentions": True}
    ),
}


def half(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "query": inputs["query"][:, : tiny.HEADS // 2],
        **{name: inputs[name][:, : tiny.KV_HEADS // 2] for name in ("key", "value")},
    }


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_exact_counted_and_announced_once(case: str, layer: torch.nn.Module) -> None:
    reason, changes = CASES[case].reason, CASES[case].layer
    for name, value in changes.items():
        setattr(layer, name, value)
    inputs = step()
    inputs.update(CASES[case].inputs(inputs))
    layer.config.santa = {"samples": 4}

    with pytest.warns(UserWarning, match=f"LlamaAttention decodes with exact.*{reason}"):
        out, weights = santa_attention(layer, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = santa_attention(layer, **inputs)
    torch.testing.assert_close(out, exact(inputs))
    torch.testing.assert_close(again, out)
    if case == "attention weights":
        torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, tiny.HEADS, 1))
        assert (weights[1, ..., :20] == 0).all()
    else:
        assert weights is None
    counters = santa_hf.stats(layer).total
    assert list(counters.fallbacks.values()) == [2]
    assert reason in next(iter(counters.fallbacks))
    assert counters.sampled == counters.dense == counters.multi_token == 0

    layer.config.santa = {"samples": 4, "strict": True}
    with pytest.raises(NotImplementedError, match=f"LlamaAttention .*strict=True: .*{reason}"):
        santa_attention(layer, **inputs)

    # Asked to be dense, it is: nothing has fallen back.
    layer.config.santa = {"estimator": "dense", "strict": True}
    santa_hf.reset_stats(layer)
    torch.testing.assert_close(santa_attention(layer, **inputs)[0], exact(inputs))
    counters = santa_hf.stats(layer).total
    assert counters.dense == 1
    assert not counters.fallbacks


def test_autocast_that_mixes_dtypes_is_exact(layer: torch.nn.Module) -> None:
    """A rotation in float32 widens query and key, not the value; without autocast it is an error."""
    inputs = step()
    inputs["value"] = inputs["value"].bfloat16()
    layer.config.santa = {"samples": 4}
    with torch.autocast("cpu", torch.bfloat16):
        expected = exact(inputs)
        with pytest.warns(UserWarning, match="autocast"):
            out, _ = santa_attention(layer, **inputs)
        santa_attention(layer, **inputs)
    assert torch.equal(out, expected)
    assert [*santa_hf.stats(layer).total.fallbacks.values()] == [2]
    with pytest.raises(TypeError, match="must share one dtype"):
        santa_attention(layer, **inputs)


def test_the_step_itself_is_sampled(layer: torch.nn.Module) -> None:
    """Every case above differs from this one by its reason alone."""
    inputs = step()
    layer.config.santa = {"samples": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, weights = santa_attention(layer, **inputs)
    assert weights is None
    assert (out - exact(inputs)).abs().max() > 0.1
    assert santa_hf.stats(layer).total.sampled == 1


def test_soft_capping_and_sinks_are_computed() -> None:
    for family, kwargs in (("gemma2", {"softcap": 2.0}), ("gpt_oss", {})):
        layer = tiny.build(family).model.layers[1].self_attn
        inputs = step()
        if family == "gpt_oss":
            kwargs = {"s_aux": layer.sinks.detach()}
        exact = {"santa": {"estimator": "dense"}}
        out, _ = santa_attention(layer, **inputs, scaling=DIM**-0.5, **kwargs, **exact)
        key, value = (inputs[name].repeat_interleave(2, 1) for name in ("key", "value"))
        scores = inputs["query"] @ key.transpose(-1, -2) * DIM**-0.5
        if family == "gemma2":
            scores = 2.0 * torch.tanh(scores / 2.0)
        scores = scores.masked_fill(~inputs["attention_mask"], -torch.inf)
        if family == "gpt_oss":
            sinks = layer.sinks.detach().view(1, -1, 1, 1).expand(BATCH, -1, 1, 1)
            scores = torch.cat([scores, sinks], -1)
        expected = scores.softmax(-1)[..., :LENGTH] @ value
        torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_layer_without_an_eager_function_says_what_it_lacks() -> None:
    class Attention(torch.nn.Module):
        layer_idx = 0

    inputs = {**step(), "query": torch.randn(BATCH, 4, 2, DIM), "attention_mask": None}
    with pytest.raises(NotImplementedError, match=r"Attention asks for softcap=2\.0"):
        santa_attention(Attention().eval(), **inputs, softcap=2.0)


def test_continuous_batching_is_refused() -> None:
    layer = tiny.build("llama").model.layers[1].self_attn
    with pytest.raises(NotImplementedError, match="continuous batching"):
        santa_attention(layer, **step(), cache=object())


def test_a_layer_that_does_not_say_it_is_causal_needs_position_ids() -> None:
    class Attention(torch.nn.Module):
        layer_idx = 0
        num_key_value_groups = 2

    layer, inputs = Attention().eval(), step()
    santa_attention(layer, **inputs)
    assert santa_hf.stats(layer).total.sampled == 1
    del inputs["position_ids"]
    with pytest.warns(UserWarning, match="does not say that it is causal"):
        santa_attention(layer, **inputs)
    assert santa_hf.stats(layer).total.sampled == 1


def test_sinks_of_another_shape_are_not_sampled() -> None:
    layer = tiny.build("gpt_oss").model.layers[1].self_attn
    with pytest.warns(UserWarning, match="not one per query head"):
        santa_attention(layer, **step(), scaling=DIM**-0.5, s_aux=torch.zeros(1, 4))
    assert santa_hf.stats(layer).total.sampled == 0


def test_a_layer_without_a_config_samples_by_the_defaults() -> None:
    class Attention(torch.nn.Module):
        layer_idx = 0

    layer = Attention().eval()
    santa_attention(layer, **step())
    assert santa_hf.stats(layer).total.samples == 128 * tiny.HEADS * BATCH


def test_weights_of_several_tokens_that_are_not_causal(layer: torch.nn.Module) -> None:
    """The prefill of attention weights builds its own mask, and a causal one only where it should."""
    inputs = step()
    inputs.update(query=torch.randn(BATCH, tiny.HEADS, LENGTH, DIM), attention_mask=None)
    for is_causal in (True, False):
        out, weights = santa_attention(layer, **inputs, is_causal=is_causal, output_attentions=True)
        expected = scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], is_causal=is_causal, enable_gqa=True
        )
        torch.testing.assert_close(out, expected.transpose(1, 2))
        assert bool((weights[:, :, 0, 1:] == 0).all()) == is_causal


def test_gradients_flow_through_a_decode_step() -> None:
    """Fine-tuning on a cache: the same gradients as with SDPA, though the model is in eval mode."""
    gradients = {}
    for attention in ("sdpa", "santa"):
        model = tiny.use(tiny.build("llama"), attention)
        prompt = tiny.prompts(60)[0]
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache)
        if attention == "santa":
            with pytest.warns(UserWarning, match="autograd needs a gradient"):
                logits = model(prompt[:, :1], past_key_values=cache).logits
        else:
            logits = model(prompt[:, :1], past_key_values=cache).logits
        logits.square().mean().backward()
        gradients[attention] = [p.grad for p in model.parameters()]
    for santa, sdpa in zip(gradients["santa"], gradients["sdpa"], strict=True):
        torch.testing.assert_close(santa, sdpa)


def decode_with_mask(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """Logits of one step on a cache of 60 tokens under a mask of four dimensions."""
    prompt = tiny.prompts(60)[0]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        return model(prompt[:, :1], past_key_values=cache, attention_mask=mask).logits


def test_a_four_dimensional_mask_of_the_caller() -> None:
    """A boolean row per sequence is sampled under; additive floats are exact."""
    visible = torch.ones(1, 1, 1, 61, dtype=torch.bool)
    visible[..., 5:50] = False
    additive = torch.zeros(1, 1, 1, 61).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = tiny.shared("llama")
    expected = decode_with_mask(tiny.use(model, "sdpa"), visible)
    for mask, fallbacks in ((visible, 0), (additive, tiny.LAYERS)):
        tiny.use(model, "santa", samples=2**14)
        santa_hf.reset_stats(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = decode_with_mask(model, mask)
        assert len([w for w in caught if "santa_hf" in str(w.message)]) == bool(fallbacks)
        assert sum(santa_hf.stats(model).total.fallbacks.values()) == fallbacks
        tolerance = 1e-5 if fallbacks else 0.02
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


ENCODER_DECODERS = {
    "bart": BartConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=48,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        init_std=0.2,
        forced_eos_token_id=None,
        eos_token_id=None,
        decoder_start_token_id=1,
    ),
    "t5": T5Config(
        vocab_size=tiny.VOCABULARY,
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        initializer_factor=3.0,
        eos_token_id=None,
        decoder_start_token_id=1,
    ),
}


def test_encoder_decoder(tmp_path: Path) -> None:
    """Self-attention without a bias is sampled, as configured; the rest is exact."""
    inputs = tiny.left_padded(tiny.prompts(150, 137))
    steps = 6  # after the prefill of the one token that the decoder starts from

    def generate(model: PreTrainedModel) -> torch.Tensor:
        out = model.generate(
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    for name, config in ENCODER_DECODERS.items():
        sdpa = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa").eval()
        expected = generate(sdpa)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="santa").eval()
        model.load_state_dict(sdpa.state_dict())
        santa_hf.configure(model, {"estimator": "dense"})
        torch.testing.assert_close(generate(model), expected, rtol=1e-5, atol=1e-5)
        assert santa_hf.stats(model).total.dense == 2 * 3 * steps

        # Layers are those of the decoder, of which bart has more than encoder layers.
        budget = {"samples": 4, "layers": {2: {"samples": 6}}}
        santa_hf.configure(model, budget)
        with pytest.raises(ValueError, match="layers names layer 3"):
            santa_hf.configure(model, {"layers": {3: {"samples": 6}}})
        if name == "t5":  # its halves read copies of the configuration, which stay at SDPA
            sdpa.config._attn_implementation = "santa"
            with pytest.raises(ValueError, match="attention is 'sdpa'"):
                santa_hf.configure(sdpa, budget)
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / name, attn_implementation="santa"
        ).eval()
        for sampled in (model, loaded):
            santa_hf.reset_stats(sampled)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                generate(sampled)
            counters = santa_hf.stats(sampled).total
            if name == "bart":
                assert counters.samples == (4 + 4 + 6) * 4 * 2 * steps
                assert counters.fallbacks == {
                    "the layer is not causal (cross-attention or an encoder)": 3 * steps
                }
            else:
                assert counters.fallbacks == {"scores carry a position bias": 2 * 3 * steps}


def test_a_tower_of_one_patch_is_exact() -> None:
    """Its single query looks like a decode step, and is not."""
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        patch_size=4,
        vision_use_head=False,
    )
    model = SiglipVisionModel(config).eval()
    image = torch.randn(3, 3, 4, 4)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(image).last_hidden_state
        model.set_attn_implementation("santa")
        with pytest.warns(UserWarning, match="not causal"):
            out = model(image).last_hidden_state
    torch.testing.assert_close(out, expected)
    assert list(santa_hf.stats(model).total.fallbacks.values()) == [2]
