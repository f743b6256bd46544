"""Dynamic cache layers that grow in place, and static ones that refuse what is not theirs.

Transformers' DynamicLayer concatenates: every decode step copies the whole K and V, and moves three
times the bytes that attention reads. Here keys and values are views of buffers with head room, and a
step writes its own rows only. A buffer is made with room for an eighth more tokens than are cached, or
for `CHUNK` more if that is larger, so growing it copies at most eight rows per token written.

Everything else is DynamicLayer's: any operation that replaces `keys` or `values` lets go of the buffer,
and the next step makes a new one.

States of another model, batch or dtype are refused before anything is written. A stock static layer
counts their tokens, and leaves the rest to the error of a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

__all__ = [
    "CHUNK",
    "CheckedStaticLayer",
    "CheckedStaticSlidingWindowLayer",
    "InPlaceLayer",
    "InPlaceSlidingWindowLayer",
    "use_santa_layers",
]

CHUNK = 128


def _room(tokens: int) -> int:
    """Rows of a buffer that is made for `tokens` tokens."""
    return tokens + max(CHUNK, tokens // 8)


def _rows(like: torch.Tensor, batch: int, capacity: int) -> torch.Tensor:
    """Room (batch, KVH, capacity, D) for states like these (B, KVH, q, D)."""
    return like.new_empty(batch, like.shape[1], capacity, like.shape[3])


class _Buffer:
    """Rows (B, KVH, capacity, D) and (B, KVH, capacity, Dv); those from `start` to `stop` are the keys
    and values that a layer holds."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, stop: int) -> None:
        self.keys, self.values = keys, values
        self.start, self.stop, self.capacity = 0, stop, keys.shape[2]
        # None of these changes, and asking a tensor for them takes as long as half a view of it.
        self._key_shape, self._value_shape = keys.shape, values.shape
        self._key_strides, self._value_strides = keys.stride(), values.stride()
        self._inference = keys.is_inference() or values.is_inference()
        # The `_kind` of the last states that were found to fit.
        self.fits: tuple[Any, ...] | None = None

    def takes(self, tokens: int) -> bool:
        """Whether so many more can be written in place; a tensor made under `torch.inference_mode`
        cannot be written to outside of it."""
        return self.stop + tokens <= self.capacity and (
            not self._inference or torch.is_inference_mode_enabled()
        )

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put (B, KVH, q, D) and (B, KVH, q, Dv) behind the rows that are held."""
        # as_strided: the rows start their storage, and it costs the host half of what narrow does.
        of_keys, of_values = self._key_strides, self._value_strides
        new_keys = self.keys.as_strided(key_states.shape, of_keys, self.stop * of_keys[2])
        new_values = self.values.as_strided(value_states.shape, of_values, self.stop * of_values[2])
        new_keys.copy_(key_states)
        new_values.copy_(value_states)
        self.stop += key_states.shape[2]

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values held."""
        start, count = self.start, self.stop - self.start
        of_keys, of_values = self._key_strides, self._value_strides
        batch, heads, _, dim = self._key_shape
        keys = self.keys.as_strided((batch, heads, count, dim), of_keys, start * of_keys[2])
        batch, heads, _, dim = self._value_shape
        values = self.values.as_strided((batch, heads, count, dim), of_values, start * of_values[2])
        return keys, values


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose update writes the new rows behind the ones it holds.

    `keys` and `values` are views: after a crop, the next update writes over rows that an older view
    still shows. Clone what is to be kept. A copy (`copy.deepcopy`, `torch.save`) is independent, and
    has the rows that are held without the room behind them.
    """

    _keys: Any  # a tensor from the first update on
    _values: Any
    _buffer: _Buffer | None  # set only while keys and values are its views

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, KVH, n, D)."""
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys, self._buffer = keys, None

    @property
    def values(self) -> torch.Tensor | None:
        """(B, KVH, n, Dv)."""
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values, self._buffer = values, None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, KVH, q, D) and (B, KVH, q, Dv); returns all keys and values, as views.

        Concatenates instead where autograd needs the old tensors, and in traced code.

        Raises:
            TypeError, ValueError: dtype, device or shape are not those of the cache, which is as it was.
        """
        if _must_concatenate(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._append(key_states, value_states)

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, _, tokens, _ = key_states.shape
        if self._buffer is None or not self._buffer.takes(tokens):
            length = self._held()
            capacity = _room(length + tokens)
            # One after the other: growing needs the memory of one more tensor, not of two.
            keys = _rows(key_states, batch, capacity)
            if length:
                self.keys = keys.narrow(2, 0, length).copy_(self._keys)
            values = _rows(value_states, batch, capacity)
            if length:
                self.values = values.narrow(2, 0, length).copy_(self._values)
            self._buffer = _Buffer(keys, values, length)
        self._buffer.write(key_states, value_states)
        self._keys, self._values = self._buffer.views()
        return self._keys, self._values

    def _held(self) -> int:
        """Tokens whose keys and values are here; a sliding layer has seen more."""
        return 0 if self._keys is None or not self._keys.numel() else self._keys.shape[2]

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuse states that cannot follow those that are held."""
        kind = _kind(key_states, value_states)
        if self._buffer is not None and self._buffer.fits == kind:
            return
        if key_states.shape[2] != value_states.shape[2]:
            raise ValueError(
                f"key_states {tuple(key_states.shape)} and value_states {tuple(value_states.shape)} "
                "must be of the same tokens: (B, KVH, q, D) and (B, KVH, q, Dv)"
            )
        if not self._held():
            return
        _check_against(self._keys, self._values, key_states, value_states)
        if self._buffer is not None:
            self._buffer.fits = kind

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, as DynamicLayer does; the buffer stays in use, unless it is more
        than twice as large as it would be made now."""
        buffer, before = self._buffer, self.get_seq_length()
        super().crop(tokens_to_remove)
        held = self._held()
        if buffer is not None and held and buffer.capacity <= 2 * _room(held):
            buffer.stop -= before - self.get_seq_length()
            buffer.start = buffer.stop - held
            self._buffer = buffer

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Choose rows of the batch, as DynamicLayer does, into a buffer: the next step has nothing to
        copy, and beam search copies the cache once a step instead of twice."""
        if self._buffer is None:
            super().reorder_cache(beam_idx)
            return
        capacity, length, batch = self._buffer.capacity, self._held(), beam_idx.shape[0]
        rows = []
        for name in ("keys", "values"):
            held = getattr(self, name)
            chosen = _rows(held, batch, capacity)
            shown = chosen.narrow(2, 0, length)
            torch.index_select(held, 0, beam_idx.to(held.device), out=shown)
            setattr(self, name, shown)
            rows.append(chosen)
        self._buffer = _Buffer(rows[0], rows[1], length)

    def reset(self) -> None:
        """Forget everything that is cached (Transformers 5.17 keeps as many zeros)."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_buffer": None}
        for name in ("_keys", "_values"):
            states = state[name]
            if states is None or states.requires_grad:
                continue
            if states.untyped_storage().nbytes() > states.nbytes:
                state[name] = states.clone(memory_format=torch.contiguous_format)
        return state


class InPlaceSlidingWindowLayer(InPlaceLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A DynamicSlidingWindowLayer that moves its window along a buffer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and keep the last `sliding_window - 1` tokens; returns what they see.

        While past tokens are recorded (assisted decoding with rollback) it concatenates.

        Raises:
            TypeError, ValueError: as `InPlaceLayer.update`.
        """
        if _must_concatenate(self, key_states, value_states):
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self._check(key_states, value_states)
        if self.record_past:
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] >= self.sliding_window - 1:
            states = self._replace(key_states, value_states)
        else:
            states = self._append(key_states, value_states)
            self._slide()
        self.cumulative_length += key_states.shape[2]
        return states

    def _slide(self) -> None:
        """Hold no more than the window, in the same buffer."""
        buffer = self._buffer
        assert buffer is not None
        start = buffer.stop - self.sliding_window + 1
        if start > buffer.start:
            buffer.start = start
            self._keys, self._values = buffer.views()

    def _replace(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold the end of these states, which fills the window: a long prompt needs no buffer of its
        length, neither now nor until the window has moved to the end of it."""
        new = key_states, value_states
        states = new
        if self._held():
            states = (
                torch.cat((self._keys, key_states), dim=2),
                torch.cat((self._values, value_states), dim=2),
            )
        kept, tokens = self.sliding_window - 1, key_states.shape[2]
        keys, values = (_rows(t, t.shape[0], _room(kept)) for t in new)
        self.keys = keys.narrow(2, 0, kept).copy_(key_states.narrow(2, tokens - kept, kept))
        self.values = values.narrow(2, 0, kept).copy_(value_states.narrow(2, tokens - kept, kept))
        if kept:
            self._buffer = _Buffer(keys, values, kept)
        return states


class CheckedStaticLayer(StaticLayer):  # type: ignore[misc]
    """A StaticLayer whose update refuses states that are not of its model, batch and dtype."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, KVH, q, D) and (B, KVH, q, Dv) into the next slots; returns all slots.

        Raises:
            TypeError, ValueError: dtype, device or shape are not those of the cache, which is as it was.
                Traced code does not check.
        """
        if self.is_initialized and not torch.compiler.is_compiling():
            keys: Any = self.keys  # of the mixin, which says that they may be None
            values: Any = self.values
            _check_against(keys, values, key_states, value_states)
        states: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, *args, **kwargs
        )
        return states


class CheckedStaticSlidingWindowLayer(CheckedStaticLayer, StaticSlidingWindowLayer):  # type: ignore[misc]
    """A StaticSlidingWindowLayer whose update refuses states that are not its own."""


def _check_against(
    keys: torch.Tensor, values: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor
) -> None:
    """Refuse states that cannot follow the keys and values that are held."""
    for name, new, held in (
        ("key_states", key_states, keys),
        ("value_states", value_states, values),
    ):
        if new.dtype != held.dtype:
            raise TypeError(
                f"{name} is {new.dtype}, and the cache holds {held.dtype}: a model can only go on "
                "with a cache of its own dtype"
            )
        if new.device != held.device:
            raise ValueError(
                f"{name} is on {new.device}, and this layer of the cache on {held.device}: they "
                "must share one device"
            )
        if _shape(new) != _shape(held):
            raise ValueError(
                f"the cache holds {name} of (B, KVH, D) = {_shape(held)}, and this step adds "
                f"{_shape(new)}: is it the cache of another model or batch?"
            )


def _kind(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """All that decides whether these states can follow others."""
    return keys.shape, values.shape, keys.dtype, values.dtype, keys.device, values.device


def _shape(states: torch.Tensor) -> tuple[int, int, int]:
    batch, heads, _, dim = states.shape
    return batch, heads, dim


def _must_concatenate(
    layer: DynamicLayer, key_states: torch.Tensor, value_states: torch.Tensor
) -> bool:
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled():
        return False
    held = (layer.keys, layer.values) if layer.is_initialized else ()
    return any(states.requires_grad for states in (key_states, value_states, *held))


# What takes the place of layers of exactly these classes.
_LAYERS: dict[type, type[Any]] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingWindowLayer,
    StaticLayer: CheckedStaticLayer,
    StaticSlidingWindowLayer: CheckedStaticSlidingWindowLayer,
}


def use_santa_layers() -> None:
    """Give every DynamicCache made for a model with attention "santa" layers that grow in place, and
    every StaticCache layers that check what they are given.

    Only layers of exactly the stock classes are replaced; offloaded, quantised and user-made caches, and
    caches made without a model's config, stay as they are. May be called again.
    """
    kinds: tuple[tuple[Any, int], ...] = (DynamicCache, 1), (StaticCache, 0)
    for kind, place in kinds:
        if not hasattr(kind.__init__, "_santa"):
            kind.__init__ = _with_santa_layers(kind, place)


def _with_santa_layers(kind: Any, place: int) -> Callable[..., None]:
    """The __init__ of a kind of cache; `place` is that of the config among its arguments."""
    original = kind.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = kwargs.get("config", args[place] if len(args) > place else None)
        if config is None or type(self) is not kind or self.offloading:
            return
        if config.get_text_config(decoder=True)._attn_implementation != "santa":
            return
        self.layers[:] = [_santa_layer(layer) for layer in self.layers]

    init._santa = True  # type: ignore[attr-defined]
    return init


def _santa_layer(layer: Any) -> Any:
    """A layer of ours that holds what this one holds, if it is of a stock class."""
    kind: Any = _LAYERS.get(type(layer))
    if kind is None:
        return layer
    santa = kind.__new__(kind)  # what it holds may have been gathered already
    for name, state in vars(layer).items():
        setattr(santa, name, state)
    return santa
