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
    """`derive()`, of the mask's contents and of `what` alone; kept with a mask that was made by `share`,
    for this stream, until it is written to (not past autograd's count of writes, through `.data`).

    Derived each time where a write would go unnoticed: in inference mode, where tensors count none, and
    in a CUDA graph that is being captured, whose mask may hold something else at a replay.
    """
    kept = getattr(mask, "_santa_derived", None)
    if kept is None or mask.is_inference():
        return derive()
    stream = 0
    if mask.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return derive()
        stream = torch._C._cuda_getCurrentRawStream(mask.device.index)
    key = what, mask._version, stream
    if key not in kept:
        kept[key] = derive()
    return kept[key]  # type: ignore[no-any-return]
