"""Dynamic cache layers that grow in place.

Transformers' DynamicLayer concatenates: every decode step copies the whole K and V, and moves three
times the bytes that attention reads. Here keys and values are views of buffers with head room, and a
step writes its own rows only. A buffer is made with room for an eighth more tokens than are cached, or
for `CHUNK` more if that is larger, so growing it copies at most eight rows per token written.

Everything else is DynamicLayer's: any operation that replaces `keys` or `values` simply leaves the
buffer behind, and the next step makes a new one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["CHUNK", "InPlaceLayer", "InPlaceSlidingWindowLayer", "use_in_place_layers"]

CHUNK = 128


class _Buffer:
    """Rows (B, H, capacity, D), of which `view` is the part that the layer holds, up to `stop`."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.view: torch.Tensor | None = None
        self.stop = 0

    def append(self, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """`held` (B, H, n, D), or empty, followed by `new` (B, H, q, D), as a view of the buffer."""
        length = 0 if held is None or held.numel() == 0 else held.shape[2]
        total = length + new.shape[2]
        if held is None or held is not self.view or not self._takes(new):
            if held is not None and length and not _alike(held, new):
                if _shape(held) != _shape(new):
                    raise ValueError(
                        f"the cache holds states of (B, KVH, D) = {_shape(held)}, and this step adds "
                        f"{_shape(new)}: is it the cache of another model or batch?"
                    )
                self.rows = None  # what is returned is no view of it
                return torch.cat([held, new], dim=-2)  # its promotion, or its error
            self.rows = new.new_empty(*new.shape[:2], total + max(CHUNK, total // 8), new.shape[3])
            if held is not None and length:
                self.rows[:, :, :length] = held
            self.stop = length
        assert self.rows is not None
        self.rows.narrow(2, self.stop, new.shape[2]).copy_(new)
        self.stop += new.shape[2]
        return self.rows.narrow(2, self.stop - total, total)

    def _takes(self, new: torch.Tensor) -> bool:
        """Whether these rows can be written in place; a tensor made under `torch.inference_mode`
        cannot be written to outside of it."""
        rows = self.rows
        return (
            rows is not None
            and self.stop + new.shape[2] <= rows.shape[2]
            and _alike(rows, new)
            and (torch.is_inference_mode_enabled() or not rows.is_inference())
        )


def _shape(states: torch.Tensor) -> tuple[int, int, int]:
    batch, heads, _, dim = states.shape
    return batch, heads, dim


def _alike(rows: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two tensors differ in their number of tokens alone."""
    return _shape(new) == _shape(rows) and new.dtype == rows.dtype and new.device == rows.device


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose update writes the new rows behind the ones it holds.

    `keys` and `values` are views: after a crop, the next update writes over rows that an older view
    still shows. Clone what is to be kept. `copy.deepcopy` gives an independent layer.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._key_buffer, self._value_buffer = _Buffer(), _Buffer()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, KVH, q, D) and (B, KVH, q, Dv); returns all keys and values, as views.

        Concatenates instead where autograd needs the old tensors, and in traced code.
        """
        if _must_concatenate(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append(key_states, value_states)

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._key_buffer.append(self.keys, key_states)
        values = self._value_buffer.append(self.values, value_states)
        self.keys = self._key_buffer.view = keys
        self.values = self._value_buffer.view = values
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, as DynamicLayer does; the buffers stay in use."""
        before = self.get_seq_length()
        owned = [
            (buffer, name)
            for buffer, name in ((self._key_buffer, "keys"), (self._value_buffer, "values"))
            if self.is_initialized and getattr(self, name) is buffer.view
        ]
        super().crop(tokens_to_remove)
        for buffer, name in owned:
            buffer.view = getattr(self, name)
            buffer.stop -= before - self.get_seq_length()

    def reset(self) -> None:
        """Forget everything that is cached."""
        super().reset()
        self._key_buffer, self._value_buffer = _Buffer(), _Buffer()


class InPlaceSlidingWindowLayer(InPlaceLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that moves its window along a buffer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and keep the last `sliding_window - 1` tokens; returns what they see.

        While past tokens are recorded (assisted decoding with rollback) it concatenates.
        """
        if self.record_past or _must_concatenate(self, key_states, value_states):
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys, values = self._append(key_states, value_states)
        self.keys = self._key_buffer.view = keys[:, :, -self.sliding_window + 1 :]
        self.values = self._value_buffer.view = values[:, :, -self.sliding_window + 1 :]
        return keys, values


_IN_PLACE: dict[type, type[InPlaceLayer]] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingWindowLayer,
}


def _must_concatenate(layer: DynamicLayer, *new: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    held = (layer.keys, layer.values) if layer.is_initialized else ()
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*new, *held))


def use_in_place_layers() -> None:
    """Give every DynamicCache made for a model with attention "santa" layers that grow in place.

    Only fresh layers of exactly the stock classes are replaced; offloaded, quantised, static and
    user-made caches, and caches made without a model's config, stay as they are. May be called again.
    """
    original = DynamicCache.__init__
    if hasattr(original, "_santa"):
        return

    @functools.wraps(original)
    def init(self: DynamicCache, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = kwargs.get("config", args[1] if len(args) > 1 else None)
        if config is None or type(self) is not DynamicCache or self.offloading:
            return
        if config.get_text_config(decoder=True)._attn_implementation != "santa":
            return
        for i, layer in enumerate(self.layers):
            in_place = _IN_PLACE.get(type(layer))
            if in_place is not None and not getattr(layer, "is_initialized", False):
                window = getattr(layer, "sliding_window", None)
                self.layers[i] = in_place() if window is None else in_place(sliding_window=window)

    init._santa = True  # type: ignore[attr-defined]
    DynamicCache.__init__ = init  # type: ignore[method-assign]
