"""Where supported versions of Transformers differ: every branch on a version is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = [
    "heads_of_layer",
    "longest_query",
    "paged_layer",
    "paged_storage",
    "paged_update",
    "shareable_blocks",
]


def heads_of_layer(module: Any) -> int | None:
    """Query heads of an attention layer before they are sharded; None if it does not say."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "is_heterogeneous", False):
        return getattr(config, "num_attention_heads", None)
    # Such a config answers for one layer only, with a copy of itself.
    heads = getattr(module, "num_heads", None)
    return config.per_layer_config[module.layer_idx].num_attention_heads if heads is None else heads


def longest_query(kwargs: Mapping[str, Any]) -> int | None:
    """New tokens of the longest sequence in a step of continuous batching; None if it does not say."""
    return kwargs.get("max_length_q", kwargs.get("max_seqlen_q"))  # 5.23, 5.17


def paged_layer(cache: Any, layer: Any, kwargs: Mapping[str, Any]) -> tuple[int, torch.Tensor, int]:
    """What a step of continuous batching reads in a layer: the group of layers whose indices it shares,
    where each sequence starts in them, int (sequences + 1,), and the length of the longest."""
    if not hasattr(cache, "layer_index_to_group_indices"):  # 5.23
        allocator = cache.layer_to_allocator[layer]
        group, kind = allocator.index, allocator.layer_type
        return group, kwargs["cu_seq_lens_k"][kind], kwargs["max_length_k"][kind]
    group = cache.layer_index_to_group_indices[layer][0]
    starts, longest = kwargs["cu_seq_lens_k"], kwargs["max_seqlen_k"]
    if isinstance(starts, Mapping):
        kind = "full_attention" if cache.sliding_windows[layer] == 1 else "sliding_attention"
        starts, longest = starts[kind], longest[kind]
    return group, starts, longest


def paged_storage(cache: Any, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer as the paged cache holds them: (1, KVH, slots, D), views."""
    if not hasattr(cache, "layer_index_to_group_indices"):  # 5.23
        key, value = cache.layer_to_allocator[layer]._kv_token_views[layer]
        key = key[: len(value)]  # both end with the buffer they share, in which values come later
    else:
        index = cache.layer_index_to_group_indices[layer][1]
        key, value = cache.key_cache[index], cache.value_cache[index]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def paged_update(
    cache: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: Any,
    read: torch.Tensor,
    write: torch.Tensor,
    kwargs: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the new tokens of a step of continuous batching in the slots `write`, and gather the slots
    `read`: (1, KVH, n, D) and (1, KVH, n, Dv), the new tokens themselves if there are none to read."""
    states = {"key_states": key, "value_states": value, "layer_idx": layer}
    group = paged_layer(cache, layer, kwargs)[0]
    indices = {"read_index": {group: read}, "write_index": {group: write}}
    if not hasattr(cache, "layer_index_to_group_indices"):  # 5.23, which changes the arguments
        key, value = cache.update(**states, kwargs={**kwargs, **indices})
        return key, value
    key, value = cache.update(**states, **indices)
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def shareable_blocks(cache: Any, future: Any, prompt: int) -> Any:
    """Of the blocks that a step of continuous batching completes for a request, as it counts them, how
    many lie within the `prompt` tokens of its prompt: int (5.17), or one for each group (5.23)."""
    start = future.state.position_offset
    stop = start + future.query_length

    def within(count: int, size: int) -> int:
        last = stop // size
        return max(0, min(last, prompt // size) - (last - count))

    if not isinstance(future.complete_blocks, Mapping):
        return within(future.complete_blocks, getattr(cache, "block_size", 1))
    return {
        name: within(count, cache.cache_allocators[name].tokens_per_page)
        for name, count in future.complete_blocks.items()
    }
