"""What the layers of a decode step derive from their mask: once for all that share it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

__all__ = ["once", "share"]

T = TypeVar("T")


def share(mask: torch.Tensor) -> torch.Tensor:
    """The mask, of which layers may keep what they derive; made for one step, in eager code."""
    mask._santa_derived = {}  # type: ignore[attr-defined]
    return mask


def once(mask: torch.Tensor, what: Hashable, derive: Callable[[], T]) -> T:
    """`derive()`, of the mask's contents and of `what` alone; kept with the mask if it was made by
    `share` and has not been written to since.

    A CUDA graph that is being captured derives for itself: its mask may hold something else at a replay.
    """
    kept = getattr(mask, "_santa_derived", None)
    if kept is None or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return derive()
    key = what, None if mask.is_inference() else mask._version
    if key not in kept:
        kept[key] = derive()
    return kept[key]  # type: ignore[no-any-return]
