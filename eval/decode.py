"""Decoding of prompts that are prefilled once: every arm and seed starts from the same cache.

Prefill is dense for every arm by design of the method, so it is done once per prompt. The last W prompt
tokens, the decode window, are then fed one at a time, so that with W = 1 the token whose output is the
first answer token already goes through the decode path, for generation and for scoring alike.

Prompts of a batch are prefilled without padding on the left, which keeps SDPA's causal kernel, and laid
side by side in one buffer, aligned on the right. Arms write behind the contexts and are rewound: nothing
is copied between them.

A decode step of a small model is a thousand launches, which take longer than what they launch. On a GPU
the second step of an answer is therefore recorded as a CUDA graph, and the others replay it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

import santa_hf
from santa_hf.integration.cache import InPlaceLayer
from santa_hf.stats import LayerStats, layer_stats

__all__ = [
    "Decoded",
    "Prefix",
    "Scored",
    "Steps",
    "count_value_rows",
    "generate",
    "has_plain_cache",
    "score",
]

# Tokens of one prefill call: enough to fill a GPU, little enough that activations stay below the cache.
_PREFILL_TOKENS = 65536
# Fewest steps to come for which a graph is recorded: recording takes as long as a step or two.
_WORTH_A_GRAPH = 5


@dataclass(frozen=True)
class Decoded:
    """An answer.

    Attributes:
        text: the answer, without what ended it.
        token_ids: the tokens generated, up to and with what ended them.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """The log-likelihood of a continuation, and whether greedy decoding would have produced it."""

    log_likelihood: float
    is_greedy: bool


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a batch in buffers (B, KVH, capacity, D), filled up to a length that can be
    set back."""

    def __init__(self, batch: int, capacity: int) -> None:
        super().__init__()
        self._batch, self._capacity = batch, capacity
        # Where an update writes, and all is seen: int64 (1,). None: behind what the layer holds.
        self.slot: torch.Tensor | None = None

    def put(self, rows: torch.Tensor, stop: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the slots before `stop` of some rows (R,): (R, KVH, n, D), (R, KVH, n, Dv)."""
        self._allocate(keys, values)
        start = stop - keys.shape[2]
        self._rows[0][rows, :, start:stop] = keys
        self._rows[1][rows, :, start:stop] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, KVH, q, D) and (B, KVH, q, Dv); returns all keys and values, as views."""
        self._allocate(key_states, value_states)
        if self.slot is not None:
            for rows, new in zip(self._rows, (key_states, value_states), strict=True):
                rows.index_copy_(2, self.slot, new)
            return self._rows
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        self._rows[0][:, :, start:stop] = key_states
        self._rows[1][:, :, start:stop] = value_states
        self.rewind(stop)
        return self._rows[0][:, :, :stop], self._rows[1][:, :, :stop]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Keys that the next step sees, and the position of the first."""
        if self.slot is not None:
            return self._capacity, 0
        return super().get_mask_sizes(*args, **kwargs)

    def rewind(self, length: int) -> None:
        """Hold the first `length` slots."""
        if self.is_initialized:
            self.keys, self.values = (rows[:, :, :length] for rows in self._rows)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            # Zeros, not empty: a masked slot has weight zero, and zero times NaN is NaN.
            self._rows: tuple[torch.Tensor, torch.Tensor] = (
                keys.new_zeros(self._batch, keys.shape[1], self._capacity, keys.shape[3]),
                values.new_zeros(self._batch, values.shape[1], self._capacity, values.shape[3]),
            )
            self.rewind(0)


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether every layer of the model caches all its tokens, so that prompts can share a batch."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, InPlaceLayer) for layer in layers)


class Prefix:
    """The prefilled contexts of a batch, and where decoding from them stands.

    Args:
        model: attends as it is set to, which should be densely.
        contexts: the tokens before each prompt's decode window; may be empty.
        room: tokens that will be decoded after them at most.

    Raises:
        ValueError: several contexts for a model whose layers do not cache all tokens (sliding windows,
            recurrent states): there, use one at a time.
    """

    @torch.inference_mode()
    def __init__(
        self, model: PreTrainedModel, contexts: Sequence[Sequence[int]], room: int
    ) -> None:
        lengths = [len(context) for context in contexts]
        self.width = max(lengths)
        self.lengths = torch.tensor(lengths, device=model.device)
        self.filled = self.width
        self.capacity = self.width + room
        self._mask: torch.Tensor | None = None
        if min(lengths) < self.width:
            slots = torch.arange(self.capacity, device=model.device)
            self._mask = (slots >= self.width - self.lengths[:, None]).long()
        self._shared = has_plain_cache(model)
        if self._shared:
            count = len(DynamicCache(config=model.config).layers)
            self._cache: Any = DynamicCache()
            self._cache.layers = [_Layer(len(contexts), self.capacity) for _ in range(count)]
            self._prefill_rows(model, contexts)
        elif len(contexts) > 1:
            raise ValueError("the layers of this model do not cache all tokens: batch one prompt")
        else:
            self._cache = DynamicCache(config=model.config)
            if self.width:
                _prefill(model, torch.tensor([list(contexts[0])]), self._cache)

    @property
    def batch(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def has_buffers(self) -> bool:
        """Whether the layers write into buffers with room for all that will be decoded."""
        return self._shared

    @contextmanager
    def writing_to(self, slot: torch.Tensor) -> Iterator[DynamicCache]:
        """The cache, whose layers write to a slot (1,) of their buffers and return them whole."""
        for layer in self._cache.layers:
            layer.slot = slot
        try:
            yield self._cache
        finally:
            for layer in self._cache.layers:
                layer.slot = None

    def _prefill_rows(self, model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> None:
        for rows in _groups([len(context) for context in contexts]):
            # Padding on the right comes after every real token, which a causal layer never sees.
            longest = max(len(contexts[row]) for row in rows)
            input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, row in enumerate(rows):
                input_ids[i, : len(contexts[row])] = torch.tensor(contexts[row])
            filled: Any = DynamicCache(config=model.config)
            _prefill(model, input_ids, filled)
            index = torch.tensor(rows, device=model.device)
            # From the right to the left of the padding, all rows at once: (R, 1, longest, 1). What comes
            # to lie before a row's first token is masked.
            shift = (longest - self.lengths[index])[:, None]
            slots = (torch.arange(longest, device=model.device) - shift).clamp_(min=0)
            moved = slots[:, None, :, None]
            for layer, source in zip(self._cache.layers, filled.layers, strict=True):
                if source.is_initialized:  # not if it reads the cache of another layer
                    aligned = (
                        states.gather(2, moved.expand_as(states)) if len(rows) > 1 else states
                        for states in (source.keys, source.values)
                    )
                    layer.put(index, self.width, *aligned)
        self.restore(self.width)

    def step(self, model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        """One decode step: tokens (B,) to logits (B, V)."""
        position_ids = (self.lengths + (self.filled - self.width))[:, None]
        self.filled += 1
        return model(
            input_ids=tokens[:, None],
            attention_mask=None if self._mask is None else self._mask[:, : self.filled],
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def snapshot(self) -> Any:
        """Where decoding stands, for `restore`."""
        return self.filled if self._shared else (self.filled, copy.deepcopy(self._cache))

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot; later tokens are forgotten."""
        if self._shared:
            self.filled = snapshot
            for layer in self._cache.layers:
                layer.rewind(snapshot)
        else:
            self.filled, cache = snapshot
            self._cache = copy.deepcopy(cache)

    def visible_rows(self, model: PreTrainedModel) -> dict[int, int]:
        """Value rows that the last decode step saw, over prompts and KV heads, by layer: a sliding
        window sees its own tokens alone, and a recurrent state none."""
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
        tokens = self.lengths + (self.filled - self.width)
        rows = {}
        for i, layer in enumerate(self._cache.layers):
            keys = getattr(layer, "keys", None)
            if not isinstance(keys, torch.Tensor):
                continue
            window = getattr(layer, "sliding_window", None)
            seen = tokens
            if window is not None and i < len(kinds) and kinds[i] == "chunked_attention":
                seen = (tokens - 1) % window + 1
            elif window is not None:
                seen = tokens.clamp(max=window)
            rows[i] = int(seen.sum()) * keys.shape[1]
        return rows


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows to prefill in one call: of similar length, within `_PREFILL_TOKENS` with their padding."""
    rows = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    while rows:
        count = max(1, _PREFILL_TOKENS // lengths[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def _prefill(model: PreTrainedModel, input_ids: torch.Tensor, cache: DynamicCache) -> None:
    input_ids = input_ids.to(model.device)
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class Steps:
    """Decode steps from where a prefix stands, attending as the model is set to.

    On a GPU all but the first replay a CUDA graph, where the model and its attention allow it: the same
    operations on the same tensors, in one launch.

    Args:
        model: decodes; its attention must not be changed while the steps are in use.
        prefix: the prefilled contexts; moves on with every step.
    """

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        self._prefix = prefix
        self._eager = partial(prefix.step, model)
        self._static: _StaticStep | None = None
        worth = prefix.capacity - prefix.filled >= _WORTH_A_GRAPH
        if prefix.lengths.is_cuda and worth and _StaticStep.takes(model, prefix):
            self._static = _StaticStep(model, prefix)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B,) to logits (B, V), which the next call overwrites."""
        if self._static is not None:
            try:
                return self._static(tokens)
            except _RecordingError as error:
                warnings.warn(f"decode steps run one launch at a time: {error}", stacklevel=2)
                self._static = None
                self._prefix.restore(self._prefix.snapshot())
        return self._eager(tokens)


class _RecordingError(Exception):
    """A step cannot be recorded as a CUDA graph."""


class _StaticStep:
    """A decode step whose tensors stay where they are, as a CUDA graph needs it.

    It sees the whole buffers of a prefix through a mask, and moves on by itself: the slot that it
    writes, the positions and the mask live on the device.
    """

    _refused: ClassVar[WeakSet[PreTrainedModel]] = WeakSet()

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        device = prefix.lengths.device
        self._model, self._prefix = model, prefix
        self._slots = torch.arange(prefix.capacity, device=device)
        self._tokens = torch.zeros(prefix.batch, 1, dtype=torch.int64, device=device)
        self._slot = self._slots.new_zeros(1)
        self._positions = torch.zeros_like(self._tokens)
        self._visible = torch.zeros(
            prefix.batch, 1, 1, prefix.capacity, dtype=torch.bool, device=device
        )
        self._at: int | None = None
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def takes(cls, model: PreTrainedModel, prefix: Prefix) -> bool:
        """Whether a mask of (B, 1, 1, N) bools is all that the model's attention needs, and its calls
        can be counted: under `min_context` the device alone knows which rows a step sampled."""
        config = model.config.get_text_config(decoder=True)
        attention = str(config._attn_implementation)
        known = attention in ("sdpa", "santa") or attention.startswith("eval_top_")
        if attention == "santa":
            settings = getattr(config, "santa", None) or {}
            everywhere = (settings, *settings.get("layers", {}).values())
            known = not any(one.get("min_context") for one in everywhere)
        return known and prefix.has_buffers and model not in cls._refused

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        prefix = self._prefix
        if self._at != prefix.filled:
            self._place(prefix.filled)
        self._tokens.copy_(tokens[:, None])
        if self._graph is None and self._warm and self._tokens.is_cuda:
            self._capture()
        if self._graph is None:
            self._logits = self._run()
            self._warm = True
        else:
            self._graph.replay()
            for counters, step in self._counters:
                counters.add(step)
        prefix.filled += 1
        self._at = prefix.filled
        return self._logits

    def _place(self, filled: int) -> None:
        """Set the next step's slot, positions and mask."""
        prefix = self._prefix
        self._slot.fill_(filled)
        self._positions.copy_((prefix.lengths + (filled - prefix.width))[:, None])
        visible = (self._slots >= prefix.width - prefix.lengths[:, None]) & (self._slots < filled)
        self._visible.copy_(visible[:, None, None])

    def _run(self) -> torch.Tensor:
        self._visible |= self._slots == self._slot
        with self._prefix.writing_to(self._slot) as cache:
            logits = self._model(
                input_ids=self._tokens,
                attention_mask=self._visible,
                position_ids=self._positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        self._slot += 1
        self._positions += 1
        return logits

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # A replay does not run the Python that counts: it counts what the recorded step counts.
        live = [layer_stats(module) for module in _attention_layers(self._model)]
        before = [copy.deepcopy(counters) for counters in live]
        try:
            # The outer context restores the stream also where the capture fails to end.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._logits = self._run()
        except RuntimeError as error:
            self._refused.add(self._model)
            raise _RecordingError(str(error).splitlines()[0]) from error
        finally:
            self._counters = [
                (counters, _difference(counters, old))
                for counters, old in zip(live, before, strict=True)
            ]
            for counters, old in zip(live, before, strict=True):
                vars(counters).update(vars(old))
        self._graph = graph


def _attention_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that santa_hf counts calls of."""
    if model.config.get_text_config(decoder=True)._attn_implementation != "santa":
        return []
    return [module for module in model.modules() if getattr(module, "layer_idx", None) is not None]


def _difference(after: LayerStats, before: LayerStats) -> LayerStats:
    return LayerStats(**{name: value - vars(before)[name] for name, value in vars(after).items()})


def _feed(
    step: Callable[[torch.Tensor], torch.Tensor], prefix: Prefix, windows: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Feed the decode windows, all of one length, one token at a time; logits after the last."""
    tokens = torch.tensor([list(window) for window in windows], device=prefix.lengths.device)
    if tokens.shape != (prefix.batch, len(windows[0])) or not len(windows[0]):
        raise ValueError("every prompt needs a decode window, of at least one token and one length")
    for column in tokens.T:
        logits = step(column)
    return logits


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix,
    windows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[Decoded]:
    """Decode the windows, then generate greedily; `prefix` is left as it was.

    Args:
        model: decodes with whatever attention it is set to.
        tokenizer: turns tokens into text; its end-of-text token, and those of the model's
            generation_config, end an answer.
        prefix: the prefilled contexts.
        windows: the last tokens of each prompt, at least one and equally many.
        max_new_tokens: an answer's length at most.
        stop: strings that end an answer.

    Raises:
        ValueError: windows are empty or differ in length.
    """
    start = prefix.snapshot()
    ends = _end_tokens(model, tokenizer)
    # A GPU runs ahead of Python: looking at its tokens at every step would stop it.
    interval = 8 if prefix.lengths.is_cuda else 1
    step = Steps(model, prefix)
    steps = [_feed(step, prefix, windows).argmax(-1)]
    going_on = list(range(prefix.batch))
    while len(steps) < max_new_tokens:
        if len(steps) % interval == 0:
            rows = torch.stack(steps, 1).tolist()
            going_on = [i for i in going_on if not _ended(tokenizer, rows[i], ends, stop)]
            if not going_on:
                break
        steps.append(step(steps[-1]).argmax(-1))
    answers = [_answer(tokenizer, row, ends, stop) for row in torch.stack(steps, 1).tolist()]
    prefix.restore(start)
    return answers


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    prefix: Prefix,
    windows: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
) -> list[list[Scored]]:
    """Log-likelihoods of continuations by decode steps; `prefix` is left as it was.

    The window's last step gives the distribution of the first token of every continuation; further
    tokens are fed one at a time, one continuation of each prompt after another.

    Args:
        model: decodes with whatever attention it is set to.
        prefix: the prefilled contexts.
        windows: the last tokens of each prompt, at least one and equally many.
        continuations: for each prompt, token sequences, none of them empty.

    Raises:
        ValueError: windows are empty or differ in length.
    """
    start = prefix.snapshot()
    step = Steps(model, prefix)
    first = _log_softmax(_feed(step, prefix, windows))
    after_window = prefix.snapshot()
    results: list[list[Scored]] = [[] for _ in windows]
    for i in range(max(map(len, continuations))):
        # Prompts with fewer continuations, or shorter ones, are fed padding and not looked at.
        rows = [row[i] if i < len(row) else () for row in continuations]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for r, row in enumerate(rows):
            tokens[r, : len(row)] = torch.tensor(row, dtype=torch.int64)
        tokens = tokens.to(first.device)
        log_probs, greedy = [], []
        log_softmax = first
        for t in range(tokens.shape[1]):
            if t:
                log_softmax = _log_softmax(step(tokens[:, t - 1]))
            log_probs.append(log_softmax.gather(1, tokens[:, t, None])[:, 0])
            greedy.append(log_softmax.argmax(-1) == tokens[:, t])
        if tokens.shape[1] > 1:
            prefix.restore(after_window)
        by_row = zip(
            torch.stack(log_probs, 1).tolist(), torch.stack(greedy, 1).tolist(), strict=True
        )
        for r, (values, equal) in enumerate(by_row):
            if n := len(rows[r]):
                results[r].append(Scored(sum(values[:n]), all(equal[:n])))
    prefix.restore(start)
    return results


@torch.inference_mode()
def count_value_rows(
    model: PreTrainedModel, prefix: Prefix, windows: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Value rows read and value rows visible at the step of the windows' last tokens, over prompts,
    layers and KV heads. `prefix` is left as it was.

    A layer is taken at its word on the rows of the batch that it counts (santa_hf, the foil); any other
    row is exact, and reads what it sees.
    """
    start = prefix.snapshot()
    step = partial(prefix.step, model)
    if len(windows[0]) > 1:
        _feed(step, prefix, [window[:-1] for window in windows])
    santa_hf.reset_stats(model)
    with santa_hf.count_value_rows():
        _feed(step, prefix, [window[-1:] for window in windows])
    visible = prefix.visible_rows(model)
    unread = 0
    for i, counters in santa_hf.stats(model).layers.items():
        # A layer may see more than it caches: another's cache, or latents expanded for every head.
        visible[i] = max(visible.get(i, 0), counters.rows_visible)
        unread += counters.rows_visible - counters.rows_read
    prefix.restore(start)
    total = sum(visible.values())
    return total - unread, total


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Natural log of the softmax, in float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _ended(
    tokenizer: PreTrainedTokenizerBase, row: list[int], ends: set[int], stop: Sequence[str]
) -> bool:
    if not ends.isdisjoint(row):
        return True
    return bool(stop) and any(string in _text(tokenizer, row) for string in stop)


def _answer(
    tokenizer: PreTrainedTokenizerBase, row: list[int], ends: set[int], stop: Sequence[str]
) -> Decoded:
    """The answer in the tokens of one row, which may go on after its end."""
    end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    row = row[:end]
    text = _text(tokenizer, row)
    stop = [string for string in stop if string and string in text]
    if stop:
        low, high = 1, len(row)  # fewest tokens whose text holds a stop string
        while low < high:
            middle = (low + high) // 2
            if any(string in _text(tokenizer, row[:middle]) for string in stop):
                high = middle
            else:
                low = middle + 1
        row = row[:low]
    for string in stop:
        text = text.split(string)[0]
    return Decoded(text, tuple(row))


def _text(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> str:
    return str(tokenizer.decode(row, skip_special_tokens=True))
