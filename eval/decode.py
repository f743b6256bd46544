"""Decoding of prompts that are prefilled once: every arm and seed starts from the same cache.

Prefill is dense for every arm by design of the method, so it is done once per prompt. The last W prompt
tokens, the decode window, are then fed one at a time, so that with W = 1 the token whose output is the
first answer token already goes through the decode path, for generation and for scoring alike.

Prompts of a batch are prefilled without padding on the left, which keeps SDPA's causal kernel, and laid
side by side in one buffer, aligned on the right. Arms write behind the contexts and are rewound: nothing
is copied between them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

import santa_hf
from santa_hf.integration.cache import InPlaceLayer

__all__ = [
    "Decoded",
    "Prefix",
    "Scored",
    "count_value_rows",
    "generate",
    "has_plain_cache",
    "score",
]

# Tokens of one prefill call: enough to fill a GPU, little enough that activations stay below the cache.
_PREFILL_TOKENS = 65536


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

    def put(self, row: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the slots of one row from `start` on: (KVH, n, D), (KVH, n, Dv)."""
        self._allocate(keys[None], values[None])
        stop = start + keys.shape[1]
        self._rows[0][row, :, start:stop] = keys
        self._rows[1][row, :, start:stop] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, KVH, q, D) and (B, KVH, q, Dv); returns all keys and values, as views."""
        self._allocate(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        self._rows[0][:, :, start:stop] = key_states
        self._rows[1][:, :, start:stop] = value_states
        self.rewind(stop)
        return self._rows[0][:, :, :stop], self._rows[1][:, :, :stop]

    def rewind(self, length: int) -> None:
        """Hold the first `length` slots."""
        if self.is_initialized:
            self.keys, self.values = (rows[:, :, :length] for rows in self._rows)

    def first(self, batch: int) -> _Layer:
        """The first rows of the batch, in the same memory."""
        layer = _Layer(batch, self._capacity)
        if self.is_initialized:
            layer._rows = tuple(rows[:batch] for rows in self._rows)
            layer.lazy_initialization(*layer._rows)
            layer.rewind(self.get_seq_length())
        return layer

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            # Zeros, not empty: a masked slot has weight zero, and zero times NaN is NaN.
            self._rows = tuple(
                t.new_zeros(self._batch, t.shape[1], self._capacity, t.shape[3])
                for t in (keys, values)
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
        self._mask: torch.Tensor | None = None
        if min(lengths) < self.width:
            slots = torch.arange(self.width + room, device=model.device)
            self._mask = (slots >= self.width - self.lengths[:, None]).long()
        self._shared = has_plain_cache(model)
        if self._shared:
            count = len(DynamicCache(config=model.config).layers)
            self._cache: Any = DynamicCache()
            self._cache.layers = [_Layer(len(contexts), self.width + room) for _ in range(count)]
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

    def _prefill_rows(self, model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> None:
        for rows in _groups([len(context) for context in contexts]):
            # Padding on the right comes after every real token, which a causal layer never sees.
            longest = max(len(contexts[row]) for row in rows)
            input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, row in enumerate(rows):
                input_ids[i, : len(contexts[row])] = torch.tensor(contexts[row])
            filled: Any = DynamicCache(config=model.config)
            _prefill(model, input_ids, filled)
            for layer, source in zip(self._cache.layers, filled.layers, strict=True):
                # A layer that reads the cache of another one has none of its own.
                for i, row in enumerate(rows if source.is_initialized else ()):
                    n = len(contexts[row])
                    keys, values = source.keys[i, :, :n], source.values[i, :, :n]
                    layer.put(row, self.width - n, keys, values)
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

    def first(self, batch: int) -> Prefix:
        """The first prompts alone, in the same memory, with a position of their own."""
        part: Prefix = copy.copy(self)
        part.lengths = self.lengths[:batch]
        part._mask = None if self._mask is None else self._mask[:batch]
        if self._shared:
            part._cache = DynamicCache()
            part._cache.layers = [layer.first(batch) for layer in self._cache.layers]
        else:
            part._cache = copy.deepcopy(self._cache)
        return part

    def visible_rows(self) -> int:
        """Value rows that a decode step sees now, over prompts, layers and KV heads."""
        tokens = int(self.lengths.sum()) + self.batch * (self.filled - self.width)
        heads = sum(layer.keys.shape[1] for layer in self._cache.layers if layer.is_initialized)
        return tokens * heads


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


def _feed(model: PreTrainedModel, prefix: Prefix, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Feed the decode windows, all of one length, one token at a time; logits after the last."""
    tokens = torch.tensor([list(window) for window in windows], device=prefix.lengths.device)
    if tokens.shape != (prefix.batch, len(windows[0])) or not len(windows[0]):
        raise ValueError("every prompt needs a decode window, of at least one token and one length")
    for step in tokens.T:
        logits = prefix.step(model, step)
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
    steps = [_feed(model, prefix, windows).argmax(-1)]
    while len(steps) < max_new_tokens:
        if len(steps) % interval == 0:
            rows = torch.stack(steps, 1).tolist()
            if all(_ended(tokenizer, row, ends, stop) for row in rows):
                break
        steps.append(prefix.step(model, steps[-1]).argmax(-1))
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
    first = _log_softmax(_feed(model, prefix, windows))
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
                log_softmax = _log_softmax(prefix.step(model, tokens[:, t - 1]))
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
) -> int:
    """Value rows visible at the step of the windows' last token; what a sampled step read of them is
    counted in `santa_hf.stats(model)`. `prefix` is left as it was."""
    start = prefix.snapshot()
    if len(windows[0]) > 1:
        _feed(model, prefix, [window[:-1] for window in windows])
    santa_hf.reset_stats(model)
    with santa_hf.count_value_rows():
        _feed(model, prefix, [window[-1:] for window in windows])
    visible = prefix.visible_rows()
    prefix.restore(start)
    return visible


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
