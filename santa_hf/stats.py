"""Counters: what each attention layer did with its calls, and why it did not sample.

Counting never waits for a GPU: which rows of a call were exact may be known to the device alone, and is
asked when counters are read. Only `count_value_rows` waits. Calls inside a compiled graph are not seen,
since Python does not run there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

__all__ = [
    "LayerStats",
    "Stats",
    "count_as_dense",
    "count_value_rows",
    "layer_stats",
    "reset_stats",
    "stats",
]


@dataclass
class LayerStats:
    """Counters of one attention layer, or of a whole model when summed.

    Attributes:
        sampled: decode calls that drew samples, for one row of the batch at least.
        samples: draws, summed over rows of the batch and query heads.
        dense: decode calls that were dense as configured (estimator "dense", or in every row fewer
            visible keys than min_context).
        multi_token: calls with several query tokens (speculative verification) or of a prefill, which
            may come in pieces of one token: dense by design.
        fallbacks: decode calls that went dense because they cannot be sampled, or that expanded
            latents to be dense, by reason.
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


class _ExactRows:
    """Rows that calls of one shape counted as sampled and were exact; added up on their device."""

    def __init__(self, draws: int) -> None:
        self.draws = draws  # of one row
        self.calls: list[torch.Tensor] = []  # bool (B,) each, not added up yet
        self.sums: torch.Tensor | int = 0  # int64 (2,): calls that were exact as a whole, rows

    def add(self, exact: torch.Tensor) -> None:
        self.calls.append(exact)
        if len(self.calls) == 256:  # most steps launch nothing, and memory stays bounded
            self.total()

    def total(self) -> torch.Tensor:
        import torch

        if self.calls:
            calls = torch.stack(self.calls)
            self.sums = self.sums + torch.stack((calls.all(1).sum(), calls.sum()))
            self.calls = []
        return cast("torch.Tensor", self.sums)


_by_module: WeakKeyDictionary[Any, LayerStats] = WeakKeyDictionary()
_exact_rows: WeakKeyDictionary[Any, dict[Any, _ExactRows]] = WeakKeyDictionary()
_warned: set[str] = set()
_count_rows = False


def layer_stats(module: Any) -> LayerStats:
    """The counters of an attention module, created at its first call."""
    try:
        return _by_module[module]
    except KeyError:
        return _by_module.setdefault(module, LayerStats())


def count_as_dense(module: Any, exact: torch.Tensor, draws: int) -> None:
    """Note that the rows `exact`, bool (B,), of a call that was counted as sampled were not.

    Args:
        draws: samples that were counted for each row.
    """
    key = (draws, exact.shape, exact.device)
    known = _exact_rows.setdefault(module, {})
    known.setdefault(key, _ExactRows(draws)).add(exact)


def _settle(module: Any) -> None:
    """Wait for the device, and correct the counters of a module by what `count_as_dense` noted."""
    for rows in _exact_rows.pop(module, {}).values():
        calls, exact = rows.total().tolist()
        counters = layer_stats(module)
        counters.sampled -= calls
        counters.dense += calls
        counters.samples -= exact * rows.draws


def stats(model: Any) -> Stats:
    """What the attention layers of `model` have done since they were made or last reset.

    Returns:
        A `Stats`; layers that were never called do not appear. A model whose layers share an index
        (a vision tower beside a language model) has their counters added.
    """
    layers: dict[int, LayerStats] = {}
    total = LayerStats()
    for module in model.modules():
        _settle(module)
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
        _exact_rows.pop(module, None)


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
