"""A mask that the caller made: Transformers hands it to the layers unseen, past the mask function.

Of the wrong length, it is found out by the first layer, whose cache has grown by then. So its length is
compared before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import masking_utils

__all__ = ["check_given_masks"]


def check_given_masks() -> None:
    """Let models with attention "santa" refuse a 4-D mask of one query token that does not fit the
    cache, before anything is written. May be called again."""
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
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 4
            and inputs_embeds.shape[1] == 1
            and past_key_values is not None
            and encoder_hidden_states is None
            and config._attn_implementation == "santa"
            # The length of a sliding layer of a static cache would be a constant of the graph.
            and not torch.compiler.is_compiling()
        ):
            keys, _ = past_key_values.get_mask_sizes(1, layer_idx)
            if attention_mask.shape[-1] not in (1, keys):
                raise ValueError(
                    f"attention_mask must end in the {keys} keys of the cache, got "
                    f"{tuple(attention_mask.shape)}"
                )
        return original(
            config, inputs_embeds, attention_mask, past_key_values, position_ids, layer_idx,
            encoder_hidden_states,
        )  # fmt: skip

    preprocess._santa = True  # type: ignore[attr-defined]
    masking_utils._preprocess_mask_arguments = preprocess  # type: ignore[assignment, unused-ignore]
