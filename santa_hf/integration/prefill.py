"""What is prefill: the tokens of a prompt, which are dense however they are cut into pieces.

A piece of a prompt may be one token long (the last of a chunked prefill, or a prompt of one token), and
then looks like a decode step. `generate` computes all of a prompt in `_prefill`, so there it is marked;
continuous batching knows the prompt of each request (see `paged`).

One token on top of a cache that holds others is a decode step: `generate` continues from a saved cache
by the token that it generated last. So is any call of a model's forward with one token.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.utils import GenerationMixin

__all__ = ["is_prefill", "mark_prefill", "prefilling"]


class _Prefill(threading.local):
    depth = 0


_of_thread = _Prefill()
# Dynamo guards on a module's variables, and not on a thread's: all that compiled code reads. While one
# thread prefills in chunks, a compiled step of another would be dense.
_of_graphs = 0


def is_prefill() -> bool:
    """Whether the tokens of this call are a prompt's, however few."""
    if torch.compiler.is_compiling():
        return _of_graphs > 0
    return _of_thread.depth > 0


@contextmanager
def prefilling(compiled: bool = False) -> Iterator[None]:
    """Within this context, calls of this thread with one query token are prefill; those of compiled
    graphs only if `compiled`."""
    global _of_graphs
    _of_thread.depth += 1
    _of_graphs += compiled
    try:
        yield
    finally:
        _of_thread.depth -= 1
        _of_graphs -= compiled


def mark_prefill() -> None:
    """Let `generate` say that it prefills. May be called again."""
    original = GenerationMixin._prefill
    if hasattr(original, "_santa"):
        return

    @functools.wraps(original)
    def prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, **others: Any
    ) -> Any:
        arguments = (self, input_ids, generation_config, model_kwargs)
        if not _is_prompt(*arguments):
            return original(*arguments, **others)
        with prefilling(compiled=generation_config.prefill_chunk_size is not None):
            return original(*arguments, **others)

    prefill._santa = True  # type: ignore[attr-defined]
    GenerationMixin._prefill = prefill  # type: ignore[method-assign, assignment]


def _is_prompt(model: Any, input_ids: torch.Tensor, generation_config: Any, kwargs: Any) -> bool:
    """Whether a santa model's tokens that are not cached yet are more than the last one generated."""
    if model.config.get_text_config(decoder=True)._attn_implementation != "santa":
        return False
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    if past == 0:
        return True
    encoder_decoder = model.config.is_encoder_decoder
    embeddings = None if encoder_decoder else kwargs.get("inputs_embeds")
    given = int((input_ids if embeddings is None else embeddings).shape[1])
    mask = kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    covered = getattr(generation_config, "_mask_length", given) if mask is None else mask.shape[1]
    # As `_prefill` decides whether it was given the tokens in the cache, too.
    return given - past > 1 if covered == given else given > 1
