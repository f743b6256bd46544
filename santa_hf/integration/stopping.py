"""Stopping one step late, so that the host prepares a step while the GPU computes the one before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.utils import DeferredStopCheck

__all__ = ["deferred_stopping"]


@contextmanager
def deferred_stopping() -> Iterator[None]:
    """Within this context, `generate` on a CUDA device does not wait for each step to end.

    After every step, `generate` asks the device whether all sequences have ended, and the device is
    idle while the host prepares the next one. Transformers can ask a step late, compute one step more
    than it needs and undo it, but does so on MPS alone (`DeferredStopCheck`). Here it may, where its
    other conditions hold: no assistant, and a cache that can be cropped or is not returned. Tokens are
    the same; `santa_hf.stats` counts the step that is undone.

    It holds for every `generate` of the process while it is active.
    """
    allowed = DeferredStopCheck.is_supported

    def is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
        device = torch.device("mps") if device.type == "cuda" else device
        return bool(allowed(device, *args, **kwargs))

    DeferredStopCheck.is_supported = staticmethod(is_supported)  # type: ignore[method-assign]
    try:
        yield
    finally:
        DeferredStopCheck.is_supported = staticmethod(allowed)  # type: ignore[method-assign]
