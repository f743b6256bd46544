"""DeepSeek V2 and V3: latent attention, through keys and values that the model expands itself."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel

import santa_hf

NEW_TOKENS = 6
PADDED = tiny.left_padded(tiny.prompts(150, 90))


def build(family: str) -> PreTrainedModel:
    """Value heads of 12 beside query heads of 16 + 8, and one dense and one expert layer."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=tiny.VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="santa").eval()


def generate(model: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    """Raw logits of each new token: (B, NEW_TOKENS, vocabulary)."""
    out = model.generate(
        **PADDED,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_dense_equals_sdpa_and_sampling_is_counted(family: str, cache: str) -> None:
    model = build(family)
    exact = generate(tiny.use(model, "sdpa"), cache_implementation=cache)
    dense = generate(tiny.use(model, "santa", estimator="dense"), cache_implementation=cache)
    torch.testing.assert_close(dense, exact, rtol=1e-5, atol=1e-5)

    santa_hf.reset_stats(model)
    sampled = generate(tiny.use(model, "santa", samples=16), cache_implementation=cache)
    total = santa_hf.stats(model).total
    assert (total.sampled, total.multi_token) == (2 * (NEW_TOKENS - 1), 2)
    assert not total.fallbacks
    assert (sampled - exact)[:, 1:].abs().max() > 1e-2
