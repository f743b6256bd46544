"""DeepSeek-R1-Distill: head counts of the real models, few narrow layers, and the shipped budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import santa_hf

CONFIGS = Path(__file__).parents[1] / "configs"
LAYERS = 2
HEAD_SIZE = 128
# Query heads on KV heads, and the rotary embedding, of the published configurations.
MODELS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "deepseek-r1-distill-qwen-7b": (
        "Qwen2Config", 28, 4, {"rope_type": "default", "rope_theta": 1e4},
    ),
    "deepseek-r1-distill-llama-8b": (
        "LlamaConfig", 32, 8,
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> PreTrainedModel:
    kind, heads, kv_heads, rotary = MODELS[name]
    config = getattr(transformers, kind)(
        vocab_size=tiny.VOCABULARY,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        rope_parameters=rotary,
        max_position_embeddings=131072,
        initializer_range=0.1,
    )
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="santa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def steps(model: PreTrainedModel, context: int, count: int = 4) -> torch.Tensor:
    """Logits of decode steps behind a cache of random keys and values: (count, vocabulary)."""
    generator = torch.Generator().manual_seed(context)
    cache = DynamicCache(config=model.config)
    kv_heads = model.config.num_key_value_heads
    for layer in range(LAYERS):
        states = [torch.randn(1, kv_heads, context, HEAD_SIZE, generator=generator) for _ in "kv"]
        cache.update(*states, layer)
    token, logits = torch.tensor([[5]]), []
    with torch.no_grad():
        for i in range(count):
            position = torch.tensor([[context + i]])
            out = model(token, past_key_values=cache, position_ids=position)
            logits.append(out.logits[0, -1])
            token = torch.tensor([[7 + i]])
    return torch.stack(logits)


@each_model
def test_the_shipped_budget_is_followed(name: str) -> None:
    model = build(name)
    config = santa_hf.SantaConfig.from_yaml(CONFIGS / f"{name}.yaml")
    context, heads = config.min_context + 30, MODELS[name][1]
    tiny.use(model, "sdpa")
    expected = steps(model, context)
    tiny.use(model, "santa")
    santa_hf.configure(model, CONFIGS / f"{name}.yaml")
    santa_hf.reset_stats(model)
    out = steps(model, context)
    counted = santa_hf.stats(model)
    assert [(c.dense, c.sampled) for c in counted.layers.values()] == [(4, 0), (0, 4)]
    assert counted.total.samples == 4 * heads * config.samples
    assert not counted.total.fallbacks
    # Random values nearly cancel, so the error is large; 64 times the draws leave an eighth, or less.
    error = float((out - expected).square().mean().sqrt())
    santa_hf.configure(model, {**config.to_dict(), "samples": 64 * config.samples})
    smaller = float((steps(model, context) - expected).square().mean().sqrt())
    assert 1e-3 < smaller < error / 6


@each_model
def test_generation_below_the_crossover_is_exact(name: str) -> None:
    model = build(name)
    inputs: dict[str, Any] = tiny.left_padded(tiny.prompts(60, 41))
    expected = tiny.use(model, "sdpa").generate(**inputs, max_new_tokens=8, do_sample=False)
    tiny.use(model, "santa")
    santa_hf.configure(model, CONFIGS / f"{name}.yaml")
    santa_hf.reset_stats(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)
    total = santa_hf.stats(model).total
    assert (total.dense, total.sampled) == (LAYERS * 7, 0)


@each_model
def test_a_generation_is_sampled_without_a_crossover(name: str) -> None:
    """End to end, padded, with the budget's draws at every layer but the first."""
    model = build(name)
    config = santa_hf.SantaConfig.from_yaml(CONFIGS / f"{name}.yaml").to_dict()
    santa_hf.configure(tiny.use(model, "santa"), {**config, "min_context": 0, "strict": True})
    santa_hf.reset_stats(model)
    inputs: dict[str, Any] = tiny.left_padded(tiny.prompts(150, 90))
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 158)
    total = santa_hf.stats(model).total
    assert total.samples == 7 * 2 * MODELS[name][1] * config["samples"] * (LAYERS - 1)
