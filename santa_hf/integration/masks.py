"""The mask function that `attn_implementation="santa"` resolves to.

It is SDPA's, but for the masks of decode steps, which are made without a wait for the device.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from ..shared import share

__all__ = ["santa_mask"]


def santa_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # int, or an integer tensor () with a static cache
    kv_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask function of Transformers' AttentionMaskInterface: SDPA's, which is bool, or None for none.

    Registered under the name of the attention function: without it Transformers passes no mask at all,
    and padding is silently attended to. The mask of a decode step hides what SDPA's hides, and is made
    without asking the device whether there is any padding: the host would wait for it at every step.

    Raises:
        ValueError: the mask is longer than the cache, or this step is beyond the end of a static one.
            (Where a static cache on a GPU ends is known to the device alone, which stops at a check of
            its own.)
    """
    mask_function = kwargs.get("mask_function")
    full = mask_function is causal_mask_function
    two_dimensional = attention_mask is None or attention_mask.ndim == 2
    eager = isinstance(kv_offset, int) and not torch.compiler.is_compiling()
    if eager:
        room, stop = kv_length + kv_offset, q_offset + q_length if _on_host(q_offset) else 0
        if stop > room:
            raise ValueError(
                f"position {stop - 1} is beyond the end of the cache: it has room for "
                f"max_cache_len={room} tokens"
            )
        # A static cache may come with a mask for all that it will ever hold; so may a sliding layer
        # of one, which does not tell itself from a dynamic one.
        if full and attention_mask is not None and two_dimensional:
            covered = attention_mask.shape[-1]
            if covered > room:
                raise ValueError(
                    f"attention_mask covers {covered} tokens, and the cache with this step {room}"
                )
    if q_length == 1 and two_dimensional and isinstance(kv_offset, int):
        batch = kwargs["batch_size"]
        if full and isinstance(q_offset, torch.Tensor) and kv_offset == 0:
            return _static_row(batch, kv_length, q_offset, attention_mask)
        window = None if full or not eager else _sliding_window(mask_function)
        if eager and isinstance(q_offset, int) and (full or window is not None):
            shown = (kv_offset if window is None else max(kv_offset, q_offset - window + 1), stop)
            skip = kwargs.get("allow_is_causal_skip", True)
            device = torch.device(kwargs.get("device", "cpu"))
            return _row(batch, kv_length, kv_offset, shown, attention_mask, device, skip)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )


def _on_host(offset: Any) -> bool:
    return isinstance(offset, int) or offset.device.type == "cpu"


_CAUSAL_WINDOW = sliding_window_causal_mask_function(1).__code__
_WINDOW = sliding_window_overlay(1).__code__


def _sliding_window(mask_function: Any) -> int | None:
    """The window of Transformers' causal sliding window function, which closes over it, else None."""
    if getattr(mask_function, "__code__", None) is not _CAUSAL_WINDOW:
        return None
    parts = mask_function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    if getattr(parts[0], "__code__", None) is not _WINDOW:
        return None
    return cast(int, parts[0].__closure__[0].cell_contents)


def _row(
    batch: int,
    length: int,
    first: int,
    shown: tuple[int, int],
    padding: torch.Tensor | None,
    device: torch.device,
    skip: bool,
) -> torch.Tensor | None:
    """The mask of one step, bool (batch, 1, 1, length), where the host knows its position.

    Args:
        first: position of the first of the `length` keys.
        shown: positions from and to which keys are visible, but for `padding` (batch, n), bool.
        skip: whether the mask may be None if it hides nothing, and a view. Where it may not, a compiled
            step takes it, for which masks are alike.
    """
    start, stop = shown
    whole = shown == (first, first + length)
    if padding is None:
        if whole and skip:
            return None
        row = torch.zeros(1, length, dtype=torch.bool, device=device)
        row[:, start - first : stop - first].fill_(True)
    else:
        padding = padding.to(device, torch.bool)
        if whole and stop <= padding.shape[1]:
            row = padding[:, start:stop]
            if not skip or start:  # a view that wanders would be aligned differently at every step
                row = row.clone()
        else:
            row = padding.new_zeros(len(padding), length)
            stop = max(start, min(stop, padding.shape[1]))
            row[:, start - first : stop - first].copy_(padding[:, start:stop])
    return share(row[:, None, None].expand(batch, 1, 1, length))


def _static_row(
    batch: int, length: int, position: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor:
    """The mask of one step on a full layer of a static cache, bool (batch, 1, 1, length).

    SDPA's function launches a dozen small kernels for it, which the GPU waits for before it can replay
    the graph of the step.
    """
    slots = torch.arange(length, device=position.device)
    if padding is None:
        row = (slots <= position)[None]
    else:
        covered = padding[:, :length].to(position.device, torch.bool)
        if covered.shape[1] < length:  # what the mask does not cover is hidden
            position = position.clamp(max=covered.shape[1] - 1)
        row = slots <= position.expand(len(covered), 1)
        row[:, : covered.shape[1]].logical_and_(covered)
    mask = row[:, None, None].expand(batch, 1, 1, length)
    return mask if torch.compiler.is_compiling() else share(mask)
