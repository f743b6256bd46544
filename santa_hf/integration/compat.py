"""Where supported versions of Transformers differ: every branch on a version is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["longest_query", "paged_update"]


def longest_query(kwargs: Mapping[str, Any]) -> int | None:
    """New tokens of the longest sequence in a step of continuous batching; None if it does not say."""
    return kwargs.get("max_length_q", kwargs.get("max_seqlen_q"))  # 5.23, 5.17


def paged_update(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer: Any, kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Write the new tokens of a step of continuous batching, and read those of every sequence.

    Returns:
        Keys and values (1, KVH, n, D), where each sequence starts in them, int (sequences + 1,), and
        the length of the longest.
    """
    if not hasattr(cache, "layer_index_to_group_indices"):
        # 5.23: the cache narrows the arguments down to the layer itself.
        narrowed = dict(kwargs)
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=layer, kwargs=narrowed
        )
        return key, value, narrowed["cu_seq_lens_k"], narrowed["max_length_k"]
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=layer,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    starts, longest = kwargs["cu_seq_lens_k"], kwargs["max_seqlen_k"]
    if isinstance(starts, Mapping):
        kind = "full_attention" if cache.sliding_windows[layer] == 1 else "sliding_attention"
        starts, longest = starts[kind], longest[kind]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], starts, longest
