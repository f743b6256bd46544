"""Continuous batching: `model.generate_batch` with attention "santa".

A step holds the new tokens of many sequences one after the other. Sequences with one new token decode
and are sampled, together, as rows of one padded batch; the others prefill and are dense, and so is a
single token of a prompt. A sequence therefore draws the same uniforms as in `generate`.

The paged cache gathers what a prefill attends to. Of a decode step it stores the new tokens only: the
kernels read all keys, and the values that are drawn, in its storage, through the slots of each sequence.

Keys and values of a generated token come out of sampled attention, and are not what a dense prefill of
it gives. Transformers takes one for the other: under cache pressure it drops a request's cache and
prefills prompt and generated tokens again, and it shares blocks of the cache by their tokens alone. Here
an evicted request is fed its generated tokens one a step, as the first time: it takes longer, gets the
same tokens, and its draws are made, and counted, again. Blocks are shared as far as they hold a prompt.

Transformers knows no "santa" here: 5.23 refuses it or switches to flash attention, 5.17 looks for
"paged|santa". `allow_continuous_batching` lets its manager switch to `PAGED`, and back at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.scheduler import Scheduler

from ..config import SantaConfig
from ..shared import share
from .attention import santa_attention
from .compat import longest_query, paged_layer, paged_storage, paged_update, shareable_blocks
from .prefill import prefilling

__all__ = ["PAGED", "allow_continuous_batching", "santa_paged_attention", "santa_paged_mask"]

PAGED = "santa_paged"
# Of the call as a whole: a sequence of it has its own.
_OF_THE_BATCH = (
    "cache", "read_index", "write_index", "block_table", "position_ids", "is_causal",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip


def santa_paged_mask(*args: Any, **kwargs: Any) -> None:
    """No mask for the packed step: where each sequence begins is in the arguments of the attention."""


@torch.compiler.disable
def santa_paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    santa: SantaConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of Transformers' AttentionInterface for a paged cache.

    A step in which every sequence decodes does not wait for the device; one with a prefill reads the
    lengths on the host, once for all layers that cache alike.

    Args:
        module: the attention layer.
        query: (1, H, tokens, D). key, value: (1, KVH, tokens, D), of the new tokens of all sequences.
        attention_mask: ignored; `cu_seq_lens_q` and `cu_seq_lens_k` say what belongs together.

    Returns:
        (1, tokens, H, Dv), zero for padding behind the last sequence, and None.

    Raises:
        NotImplementedError: the step is being captured into a CUDA graph, or uses a block table.
        ValueError: there is no paged cache.
    """
    cache = kwargs.get("cache")
    if not isinstance(cache, PagedAttentionCache):
        raise ValueError(
            f"attention {PAGED!r} needs the paged cache of continuous batching, got {type(cache)}; "
            'use "santa" elsewhere'
        )
    if kwargs.get("block_table") is not None:
        raise NotImplementedError("santa does not read block tables: set max_blocks_per_request=0")
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "continuous batching with santa runs without CUDA graphs: set use_cuda_graph=False"
        )
    layer, tokens = cast(int, module.layer_idx), query.shape[2]
    rest = {name: given for name, given in kwargs.items() if name not in _OF_THE_BATCH}
    prefills, decodes, count = _plan(cache, layer, tokens, rest.get("sliding_window"), kwargs)
    attend: Any = functools.partial(
        santa_attention, module, dropout=dropout, scaling=scaling, santa=santa, **rest
    )
    out = query.new_empty(1, tokens, query.shape[1], value.shape[-1])
    out[:, count:] = 0
    for new, slots, write, mask in prefills:
        states = key[:, :, new], value[:, :, new]
        keys, values = paged_update(cache, *states, layer, slots, write, kwargs)
        with prefilling():
            out[:, new] = attend(query[:, :, new], keys, values, mask)[0]
    if decodes is None:
        return out, None
    new, slots, write, mask = decodes
    paged_update(cache, key[:, :, new], value[:, :, new], layer, slots[0, :0], write, kwargs)
    keys, values = (states.expand(len(slots), -1, -1, -1) for states in paged_storage(cache, layer))
    position_ids = kwargs.get("position_ids")
    sampled, _ = attend(
        query[:, :, new].transpose(0, 2),
        keys,
        values,
        mask,
        rows=slots,
        position_ids=None if position_ids is None else position_ids[:, new].view(-1, 1).long(),
    )
    out[:, new] = sampled.transpose(0, 1)
    return out, None


class _Tokens(NamedTuple):
    """New tokens of a step that attend together, and the keys that they see."""

    new: Any  # where they are among all new tokens: a slice, or an index (B,)
    slots: torch.Tensor  # of the keys: (n,) for a sequence that prefills, (B, n) for B that decode
    write: torch.Tensor  # the slots that their own keys take
    mask: torch.Tensor | None  # bool (1, 1, queries, n), or (B, 1, 1, n)


# The sequences that prefill, one by one, those that decode, if there are any, and new tokens in all.
_Plan = tuple[list[_Tokens], _Tokens | None, int]


def _plan(
    cache: Any, layer: int, tokens: int, window: int | None, kwargs: Mapping[str, Any]
) -> _Plan:
    """What this step does in a layer. The first layer finds it out for all that share its slots and its
    window; a layer that comes again has begun another step."""
    group, starts, longest = paged_layer(cache, layer, kwargs)
    read, write = kwargs["read_index"][group], kwargs["write_index"][group]
    known = cache.__dict__.setdefault("_santa_plans", {})
    plan, of, layers = known.get((group, window), (None, None, set()))
    if plan is None or layer in layers or of[0] is not read or of[1] is not write:
        prompts = getattr(cache, "_santa_prompts", [])  # whether each sequence is at its prompt
        plan = _make_plan(read, write, starts, longest, tokens, window, prompts, kwargs)
        layers = set()
        known[group, window] = plan, (read, write), layers
    layers.add(layer)
    return plan


def _make_plan(
    read: torch.Tensor,
    write: torch.Tensor,
    starts_k: torch.Tensor,
    longest_k: int,
    tokens: int,
    window: int | None,
    prompts: list[bool],
    kwargs: Mapping[str, Any],
) -> _Plan:
    """From the slots of a group of layers; `prompts` says which sequences are at their prompt."""
    starts_q = kwargs["cu_seq_lens_q"]
    if longest_query(kwargs) == 1 and starts_q.shape[0] == tokens + 1 and not any(prompts):
        new = slice(tokens)
        start, stop = starts_k[:-1], starts_k[1:]
        return [], _decodes(new, read, write[new], start, stop, longest_k, window), tokens
    q, k = starts_q.tolist(), starts_k.tolist()
    prompts = [*prompts, *[False] * (len(q) - 1 - len(prompts))]  # empty ones follow
    prefills, decoding = [], []
    for i in range(len(q) - 1):
        if q[i + 1] - q[i] > 1 or prompts[i]:
            new = slice(q[i], q[i + 1])
            mask = _prefill_mask(q[i + 1] - q[i], k[i + 1] - k[i], window, read.device)
            prefills.append(_Tokens(new, read[k[i] : k[i + 1]], write[new], mask))
        elif q[i + 1] - q[i] == 1:
            decoding.append(i)
    if not decoding:
        return prefills, None, q[-1]
    sequences = torch.tensor(decoding, device=read.device)
    index = starts_q[sequences].long()
    start, stop = starts_k[sequences], starts_k[sequences + 1]
    longest_k = max(k[i + 1] - k[i] for i in decoding)
    decodes = _decodes(index, read, write[index], start, stop, longest_k, window)
    return prefills, decodes, q[-1]


def _prefill_mask(
    queries: int, keys: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """What the last `queries` of `keys` tokens see, bool (1, 1, queries, keys); None for all before."""
    if queries == keys and (window is None or keys <= window):
        return None
    i_k = torch.arange(keys, device=device)
    i_q = i_k[keys - queries :, None]
    visible = i_k <= i_q
    if window is not None:
        visible &= i_k > i_q - window
    return visible[None, None]


def _decodes(
    new: Any,
    read: torch.Tensor,
    write: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    longest: int,
    window: int | None,
) -> _Tokens:
    """Sequences that decode, (B,), as rows of one batch.

    The slots of a sequence's keys stand in `read` from `start` to `stop`, the new token last, which is
    in the slot `write`; only the last `window` of them are taken. Shorter sequences are padded with that
    slot.
    """
    if window is not None:
        start = torch.maximum(start, stop - window)
        longest = min(longest, window)
    index = start[:, None] + torch.arange(longest, device=start.device)
    stop = stop[:, None]
    rows = torch.where(index < stop - 1, read[index.clamp(max=len(read) - 1)], write[:, None])
    mask = None if rows.shape == (1, len(read)) else share((index < stop)[:, None, None])
    return _Tokens(new, rows, write, mask)


_Method = Callable[..., Any]


def _restoring(method: _Method) -> _Method:
    """ContinuousBatchingManager: on an error before the manager runs, which nothing stops then, the
    model gets its attention back."""

    def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            before = getattr(self, "_original_attn_impl", None)
            if before is not None:
                model = getattr(self, "model", None) or (args[0] if args else kwargs["model"])
                model.set_attn_implementation(before)
                self._original_attn_impl = None
            raise

    return restoring


def _switched(switch: _Method) -> _Method:
    """ContinuousBatchingManager: a santa model attends with `PAGED`, until the manager stops."""

    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        if attention == "santa":
            self._original_attn_impl = model.config._attn_implementation
            model.set_attn_implementation(PAGED)
        elif attention != PAGED:
            switch(self, model, *args, **kwargs)

    return switch_to_cb_friendly_attn


def _prompt_length(state: Any) -> int:
    """Tokens of a request that its caller gave; the others of `initial_tokens` were generated."""
    return state._true_initial_tokens or len(state.initial_tokens)


def _samples(cache: PagedAttentionCache) -> bool:
    return bool(cache.config._attn_implementation == PAGED)


def _shared_within_the_prompt(infer: _Method) -> _Method:
    """Scheduler: a request that was evicted finds no more than its prompt in shared blocks."""

    def _infer_request_tokens(self: Any, state: Any, *args: Any) -> Any:
        fresh = not state.position_offset and not state.is_cpu_offloaded
        generated = state.remaining_prefill_tokens[_prompt_length(state) :]
        if not (_samples(self.cache) and fresh and generated):
            return infer(self, state, *args)
        state.remaining_prefill_tokens = state.remaining_prefill_tokens[: _prompt_length(state)]
        try:
            infer(self, state, *args)
        finally:
            state.remaining_prefill_tokens = state.remaining_prefill_tokens + generated
        return state.remaining_prefill_tokens

    return _infer_request_tokens


def _fed_as_generated(schedule: _Method) -> _Method:
    """Scheduler: what an evicted request had generated is fed again as it was, one token a step."""

    def _schedule_request(
        self: Any, state: Any, request_tokens: list[int], token_budget: int, *args: Any
    ) -> None:
        prompt = _prompt_length(state)
        if _samples(self.cache) and state.position_offset + len(request_tokens) > prompt:
            token_budget = min(token_budget, max(1, prompt - state.position_offset))
        schedule(self, state, request_tokens, token_budget, *args)

    return _schedule_request


def _prompts_marked(prepare: _Method) -> _Method:
    """ContinuousBatchingIOs: notes which requests of the step are at their prompt, for the attention,
    and keeps blocks with generated tokens from being shared. Steps are prepared and run in turn."""

    def prepare_batch_tensors(self: Any, requests_in_batch: Any, *args: Any, **kwargs: Any) -> None:
        if _samples(self.cache):
            for future in requests_in_batch:
                future.complete_blocks = shareable_blocks(
                    self.cache, future, _prompt_length(future.state)
                )
            self.cache._santa_prompts = [
                future.state.position_offset < _prompt_length(future.state)
                for future in requests_in_batch
            ]
        prepare(self, requests_in_batch, *args, **kwargs)

    return prepare_batch_tensors


def allow_continuous_batching() -> None:
    """Let the manager of continuous batching keep a santa model at santa, and its scheduler tell
    generated tokens from those of a prompt. May be called again."""
    for owner, name, wrapper in (
        (ContinuousBatchingManager, "__init__", _restoring),
        (ContinuousBatchingManager, "warmup", _restoring),
        (ContinuousBatchingManager, "start", _restoring),
        (ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switched),
        (Scheduler, "_infer_request_tokens", _shared_within_the_prompt),
        (Scheduler, "_schedule_request", _fed_as_generated),
        (ContinuousBatchingIOs, "prepare_batch_tensors", _prompts_marked),
    ):
        original = getattr(owner, name)
        if not hasattr(original, "_santa"):
            method = functools.wraps(original)(wrapper(original))
            method._santa = True  # type: ignore[attr-defined]
            setattr(owner, name, method)
