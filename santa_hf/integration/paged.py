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
from typing import Any

import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.scheduler import Scheduler

from ..config import SantaConfig
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
    lengths on the host, once per layer.

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
    tokens = query.shape[2]
    starts_q = kwargs["cu_seq_lens_q"]
    longest_q = longest_query(kwargs)
    position_ids = kwargs.get("position_ids")
    group, starts_k, longest_k = paged_layer(cache, module.layer_idx, kwargs)
    read, write = kwargs["read_index"][group], kwargs["write_index"][group]
    rest = {name: given for name, given in kwargs.items() if name not in _OF_THE_BATCH}
    window = rest.get("sliding_window")
    attend: Any = functools.partial(
        santa_attention, module, dropout=dropout, scaling=scaling, santa=santa, **rest
    )

    def update(new: Any, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = key[:, :, new], value[:, :, new]
        return paged_update(cache, *states, module.layer_idx, slots, write[new], kwargs)

    prompts = getattr(cache, "_santa_prompts", [])  # whether each sequence is at its prompt
    out = None
    new: Any  # where the tokens are that are attended from
    if longest_q == 1 and starts_q.shape[0] == tokens + 1 and not any(prompts):
        new, start, stop = slice(tokens), starts_k[:-1], starts_k[1:]
    else:
        q, k = starts_q.tolist(), starts_k.tolist()
        prompts = [*prompts, *[False] * (len(q) - 1 - len(prompts))]  # empty ones follow
        decoding = [i for i in range(len(q) - 1) if q[i + 1] - q[i] == 1 and not prompts[i]]
        out = query.new_zeros(1, tokens, query.shape[1], value.shape[-1])
        for i in range(len(q) - 1):
            if q[i + 1] - q[i] > 1 or prompts[i]:
                new = slice(q[i], q[i + 1])
                keys, values = update(new, read[k[i] : k[i + 1]])
                mask = _prefill_mask(q[i + 1] - q[i], keys.shape[2], window, query.device)
                with prefilling():
                    out[:, new] = attend(query[:, :, new], keys, values, mask)[0]
        if not decoding:
            return out, None
        sequences = torch.tensor(decoding, device=query.device)
        new, start, stop = starts_q[sequences].long(), starts_k[sequences], starts_k[sequences + 1]
        longest_k = max(k[i + 1] - k[i] for i in decoding)
    update(new, read[:0])
    rows, mask = _decoding_rows(read, write[new], start, stop, longest_k, window)
    keys, values = (
        states.expand(len(rows), -1, -1, -1) for states in paged_storage(cache, module.layer_idx)
    )
    sampled, _ = attend(
        query[:, :, new].transpose(0, 2),
        keys,
        values,
        None if rows.shape == (1, len(read)) else mask,
        rows=rows,
        position_ids=None if position_ids is None else position_ids[:, new].view(-1, 1).long(),
    )
    sampled = sampled.transpose(0, 1)
    if out is None:
        return sampled.contiguous(), None
    out[:, new] = sampled
    return out, None


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


def _decoding_rows(
    read: torch.Tensor,
    write: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    longest: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of the keys of sequences that decode, int (B, longest), and which of them are visible,
    bool (B, 1, 1, longest).

    Those of a sequence stand in `read` from `start` to `stop`, (B,), the new token last, which is in the
    slot `write`; only the last `window` of them are taken. Shorter sequences are padded with that slot.
    """
    if window is not None:
        start = torch.maximum(start, stop - window)
        longest = min(longest, window)
    index = start[:, None] + torch.arange(longest, device=start.device)
    stop = stop[:, None]
    rows = torch.where(index < stop - 1, read[index.clamp(max=len(read) - 1)], write[:, None])
    return rows, (index < stop)[:, None, None]


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
