"""A cache and a mask that the caller made, looked at before the first layer writes.

Transformers hands a 4-D mask to the layers unseen, past the mask function. Of the wrong length, it is
found out by the first layer, whose cache has grown by then; so is a cache of another model, by the first
layer that it lacks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DynamicCache, StaticCache, masking_utils
from transformers.cache_utils import get_layer_types_and_kwargs

__all__ = ["check_given"]


def check_given() -> None:
    """Let models with attention "santa" refuse a cache with other layers than theirs, and a 4-D mask of
    one query token that does not fit the cache, before anything is written. May be called again."""
    original = masking_utils._preprocess_mask_arguments
    if hasattr(original, "_santa"):
        return

    @functools.wraps(original)
    def preprocess(
        config: Any,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        past_key_values: Any,
        position_ids: Any,
        layer_idx: int | None,
        encoder_hidden_states: Any = None,
    ) -> Any:
        if (
            past_key_values is not None
            and encoder_hidden_states is None
            and config._attn_implementation == "santa"
            # The length of a sliding layer of a static cache would be a constant of the graph.
            and not torch.compiler.is_compiling()
        ):
            _check_layers(config, past_key_values)
            if inputs_embeds.shape[1] == 1:
                _check_length(attention_mask, past_key_values, layer_idx)
        return original(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, layer_idx,
            encoder_hidden_states,
        )  # fmt: skip

    preprocess._santa = True  # type: ignore[attr-defined]
    masking_utils._preprocess_mask_arguments = preprocess  # type: ignore[assignment, unused-ignore]


def _check_layers(config: Any, cache: Any) -> None:
    if type(cache) not in (DynamicCache, StaticCache) or cache.layer_class_to_replicate is not None:
        return  # made without a config, it takes the layers that come
    if config.attribute_map.get("num_hidden_layers") == "encoder_layers":
        return  # a decoder may have others (WhisperForCausalLM of distil-whisper: 2 of 32)
    if len(cache.layers) == config.num_hidden_layers:
        return
    # Not every layer of a model caches: as many as DynamicCache(config=config) makes, in 200 us.
    layers = len(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])
    if len(cache.layers) != layers:
        raise ValueError(
            f"past_key_values must have the {layers} layers of the model, got {len(cache.layers)}: is "
            "it the cache of another model?"
        )


def _check_length(attention_mask: Any, cache: Any, layer_idx: int | None) -> None:
    if not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4):
        return
    keys, _ = cache.get_mask_sizes(1, layer_idx)
    if attention_mask.shape[-1] not in (1, keys):
        raise ValueError(
            f"attention_mask must end in the {keys} keys of the cache, got "
            f"{tuple(attention_mask.shape)}"
        )
