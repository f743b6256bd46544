"""Counters: what each attention layer did with its calls, and why it did not sample.

Counting is plain Python on the host, and only `count_value_rows` waits for a GPU. Calls inside a
compiled graph are not seen, since Python does not run there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["LayerStats", "Stats", "count_value_rows", "layer_stats", "reset_stats", "stats"]


@dataclass
class LayerStats:
    """Counters of one attention layer, or of a whole model when summed.

    Attributes:
        sampled: decode calls that drew samples.
        samples: draws, summed over rows of the batch and query heads. Under a mask on a GPU, rows below
            min_context are known to the device alone, and count as if they had been sampled.
        dense: decode calls that were dense as configured (estimator "dense", or fewer visible keys
            than min_context).
        multi_token: calls with several query tokens (prefill, speculative verification), dense by
            design.
        fallbacks: decode calls that went dense because they cannot be sampled, by reason.
        rows_read, rows_visible: distinct value rows read and value rows visible, over rows of the
            batch and KV heads; counted only inside `count_value_rows()`.
    """

    sampled: int = 0
    samples: int = 0
    dense: int = 0
    multi_token: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    rows_visible: int = 0

    @property
    def share_of_rows_read(self) -> float:
        """Distinct value rows read over rows visible; NaN if none were counted."""
        return self.rows_read / self.rows_visible if self.rows_visible else float("nan")

    def add(self, other: LayerStats) -> None:
        """Add the counters of another layer to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Stats:
    """Counters of a model: `total` over its layers, and `layers` by layer index."""

    total: LayerStats
    layers: dict[int, LayerStats]

    def __str__(self) -> str:
        t = self.total
        lines = [
            f"sampled decode calls  {t.sampled} ({t.samples} draws)",
            f"dense as configured   {t.dense}",
            f"several query tokens  {t.multi_token}",
        ]
        if t.rows_visible:
            lines.append(f"value rows read       {t.share_of_rows_read:.2%}")
        lines += [f"fallback: {reason}  {n}" for reason, n in sorted(t.fallbacks.items())]
        return "\n".join(lines)


_by_module: WeakKeyDictionary[Any, LayerStats] = WeakKeyDictionary()
_warned: set[str] = set()
_count_rows = False


def layer_stats(module: Any) -> LayerStats:
    """The counters of an attention module, created at its first call."""
    try:
        return _by_module[module]
    except KeyError:
        return _by_module.setdefault(module, LayerStats())


def stats(model: Any) -> Stats:
    """What the attention layers of `model` have done since they were made or last reset.

    Returns:
        A `Stats`; layers that were never called do not appear. A model whose layers share an index
        (a vision tower beside a language model) has their counters added.
    """
    layers: dict[int, LayerStats] = {}
    total = LayerStats()
    for module in model.modules():
        counters = _by_module.get(module)
        if counters is not None:
            index = getattr(module, "layer_idx", None)
            layers.setdefault(-1 if index is None else index, LayerStats()).add(counters)
            total.add(counters)
    return Stats(total, dict(sorted(layers.items())))


def reset_stats(model: Any) -> None:
    """Set the counters of `model` to zero."""
    for module in model.modules():
        _by_module.pop(module, None)


@contextmanager
def count_value_rows() -> Iterator[None]:
    """Count distinct value rows read while active; costs a scatter and a sync per sampled call."""
    global _count_rows
    before, _count_rows = _count_rows, True
    try:
        yield
    finally:
        _count_rows = before


def counting_value_rows() -> bool:
    """Whether `count_value_rows` is active."""
    return _count_rows


def warn_once(reason: str, message: str) -> None:
    """Warn the first time a reason comes up in this process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, stacklevel=3)
