"""Tiny random models of every family the integration supports, and prompts that make them work.

The weights are drawn wide enough (standard deviation 0.15) that attention is peaked and a wrong mask or
a missing key moves the logits by far more than the tolerance of any test.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, PreTrainedModel

VOCABULARY = 89
LAYERS = 3
HEADS = 4
KV_HEADS = 2
# Shorter than every prompt, and no multiple of a tile.
WINDOW = 40

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# Configuration class and what it needs beyond COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 24},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}

# SDPA would ignore, or refuse, soft-capped scores and attention sinks.
WITHOUT_SDPA = ("gemma2", "gpt_oss")


def baseline(family: str) -> str:
    """The attention of Transformers to compare with."""
    return "eager" if family in WITHOUT_SDPA else "sdpa"


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A new model of `family` with attention "santa"; equal arguments give equal weights."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="santa")
        for name, parameter in model.named_parameters():
            # Sinks and biases start at zero, norms at one: move them, so that a mistake shows.
            if name.endswith((".bias", ".sinks")) or "norm" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@cache
def shared(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """One model per family and dtype for all tests; `use` resets how it attends."""
    return build(family, dtype)


def use(model: PreTrainedModel, attention: str, **santa: Any) -> PreTrainedModel:
    """Set the attention of a model and, for "santa", its configuration."""
    import santa_hf

    text_config = model.config.get_text_config(decoder=True)
    if hasattr(text_config, "santa"):
        del text_config.santa
    model.set_attn_implementation(attention)
    if attention == "santa" and santa:
        santa_hf.configure(model, santa)
    return model


def prompts(*lengths: int, seed: int = 3) -> list[torch.Tensor]:
    """Random prompts of the given lengths, without the special tokens: (1, length) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in lengths]


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of prompts, padded on the left: input_ids and attention_mask, (B, longest)."""
    longest = max(row.shape[1] for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - row.shape[1] :] = row[0]
        attention_mask[i, longest - row.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class Force(LogitsProcessor):
    """Makes generation emit given tokens (B, n), whatever the logits are."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = self.tokens[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, forced, 0.0)
