"""Greedy decoding of one prompt by several arms from copies of one prefilled cache.

Prefill is dense for every arm by design of the method, so it is done once. The last W prompt tokens, the
decode window, are then fed one at a time: with W = 1 the token whose output is the first answer token
already goes through the decode path.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Decoded", "decode", "prefill"]


@dataclass(frozen=True)
class Decoded:
    """An answer and what it cost.

    Attributes:
        text: the answer, without what ended it.
        token_ids: the tokens generated, with what ended them.
        steps: forward calls with one token, the decode window included.
        seconds: wall time of those calls and the choice of the tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    steps: int
    seconds: float


@torch.inference_mode()
def prefill(model: PreTrainedModel, token_ids: Sequence[int]) -> DynamicCache:
    """The cache after `token_ids`, which are fed in one forward call."""
    cache = DynamicCache(config=model.config)
    input_ids = torch.tensor([token_ids], device=model.device)
    model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache,
    window: Sequence[int],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Decoded:
    """Feed `window` one token at a time, then generate greedily, on a copy of `cache`.

    Args:
        model: decodes with whatever attention it is set to.
        tokenizer: its end-of-text token ends an answer; turns tokens into text.
        cache: the keys and values of what precedes `window`; left as it is.
        window: the last tokens of the prompt, at least one.
        max_new_tokens: the answer's length at most.
        stop: strings that end an answer.

    Raises:
        ValueError: `window` is empty.
    """
    if not window:
        raise ValueError("the decode window must hold at least one token")
    cache = copy.deepcopy(cache)
    position = cache.get_seq_length()
    generated: list[int] = []
    text = ""
    started = time.perf_counter()
    for token in window[:-1]:
        _step(model, cache, token, position)
        position += 1
    token = window[-1]
    while True:
        token = _step(model, cache, token, position)
        position += 1
        generated.append(token)
        if token == tokenizer.eos_token_id:
            break
        text = str(tokenizer.decode(generated, skip_special_tokens=True))
        if len(generated) == max_new_tokens or any(string in text for string in stop):
            break
    seconds = time.perf_counter() - started
    for string in stop:
        text = text.split(string)[0]
    return Decoded(text, tuple(generated), len(window) + len(generated) - 1, seconds)


def _step(model: PreTrainedModel, cache: DynamicCache, token: int, position: int) -> int:
    """One forward call with one token; the token that it makes likeliest."""
    logits = model(
        input_ids=torch.tensor([[token]], device=model.device),
        position_ids=torch.tensor([[position]], device=model.device),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return int(logits[0, -1].argmax())
