"""lm-eval's Hugging Face model with a decode window: the model class "santa".

Stock lm-eval scores a choice by one prefill and takes the first generated token from one, so a decode
method is not touched. Here all but the last `window` prompt tokens are prefilled, densely, and the rest
goes through decode steps, for scoring and for generating, several documents at a time.

`python -m eval lm-eval ARGS` registers the class and hands over to lm-eval's own command line:

    python -m eval lm-eval run --model santa --model_args pretrained=DIR,samples=64 --tasks gsm8k
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedModel

from santa_hf import SantaConfig

from . import data
from .arms import DENSE, arms_from_settings, check_device, use_arm
from .cli import CommandError
from .decode import Prefix, generate, has_plain_cache, score
from .models import changed_config, dense_attention
from .processes import device_name, processes

__all__ = ["Request", "SantaLM", "batches", "main"]

_SANTA_FIELDS = {field.name for field in dataclasses.fields(SantaConfig)} - {"layers"}
# What the stock class hands on to `from_pretrained`, of what changes no answer or has to be said there.
_LOADING = {"cache_dir", "device_map", "local_files_only", "token", "use_safetensors", "variant"}


@dataclass(frozen=True)
class Request:
    """A prompt to answer, or whose continuations to score.

    Attributes:
        tokens: the prompt, at least one token.
        max_new_tokens: the answer's length at most.
        stop: strings that end the answer.
        continuations: token sequences to score; None for a prompt to answer.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    continuations: tuple[tuple[int, ...], ...] | None = None

    @property
    def room(self) -> int:
        """Most tokens that are decoded after the prompt."""
        if self.continuations is None:
            return self.max_new_tokens
        return max(map(len, self.continuations))


def batches(
    requests: Sequence[Request], window: int, *, batch_size: int, batch_tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices of requests to run together: of one kind and window, longest first.

    Args:
        requests: what to run.
        window: prompt tokens to decode; a shorter prompt is decoded whole.
        batch_size: requests in a batch at most.
        batch_tokens: cached tokens in a batch at most, padding included, unless it is one request.
    """

    def kind(request: Request) -> tuple[Any, ...]:
        scored = request.continuations is not None
        return min(window, len(request.tokens)), scored, request.max_new_tokens, request.stop

    order = sorted(
        range(len(requests)), key=lambda i: (kind(requests[i]), -len(requests[i].tokens))
    )
    batch: list[int] = []
    for i in order:
        first = requests[batch[0]] if batch else requests[i]
        tokens = (len(batch) + 1) * (len(first.tokens) + first.room)
        full = len(batch) == batch_size or (batch_tokens is not None and tokens > batch_tokens)
        if batch and (full or kind(first) != kind(requests[i])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@register_model("santa")
class SantaLM(HFLM):  # type: ignore[misc]
    """The stock model class with a decode window.

    Args:
        pretrained: path or hub id.
        window: prompt tokens that go through the decode path, at least 1.
        config: path of a YAML file with a SantaConfig.
        attention: "santa", or "dense" for the model's own attention through the same decode steps.
        model_config: JSON of changes to the model's config, made before it is loaded.
        **kwargs: fields of SantaConfig (samples, estimator, ...), unless `config` is given; else what
            the stock class takes (dtype, revision, peft, max_length, ...).

    Raises:
        CommandError: an argument is not valid; raised before the model is loaded.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        window: int = 1,
        config: str | None = None,
        attention: str = "santa",
        model_config: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in _ARGUMENTS:
                raise CommandError(
                    f"the model class santa takes no argument {name!r}; there are "
                    f"{', '.join(sorted(_ARGUMENTS))}"
                )
        settings = {name: kwargs.pop(name) for name in _SANTA_FIELDS & set(kwargs)}
        self.seed = settings.pop("seed", 0)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise CommandError(f"window must be an integer of at least 1, got {window!r}")
        if attention not in ("santa", "dense"):
            raise CommandError(f"attention must be santa or dense, got {attention!r}")
        if config is not None:
            settings = {"config": config, **settings}
        try:
            self.arm = arms_from_settings({"santa": settings})["santa"]
            check_device(self.arm, device_name(kwargs.get("device")))
        except (OSError, TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
        if attention == "dense":
            self.arm = DENSE
        self.window = window
        # lm-eval takes the rank within a machine, and only if it sees several GPUs.
        self._processes = processes(kwargs.get("device"))
        super().__init__(pretrained, **kwargs, **changed_config(pretrained, model_config, kwargs))
        if kwargs.get("peft"):
            # Merged, the adapter costs nothing at a decode step.
            self._model: PreTrainedModel = self.model.merge_and_unload()
        self._model.requires_grad_(False)
        self.dense = dense_attention(self.model)
        self._rank = self._processes.process_index
        self._world_size = self._processes.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of every process, concatenated; a number becomes a vector."""
        if self.world_size == 1:
            return tensor
        from accelerate.utils import gather

        return gather(tensor.to(self._processes.device))

    def barrier(self) -> None:
        """Wait for every process."""
        self._processes.wait_for_everyone()

    # Requests

    def generation(
        self, prompt: str, settings: Mapping[str, Any], limit: int | None, max_length: int
    ) -> Request:
        """A prompt to answer, as the stock class would encode it.

        Raises:
            CommandError: it would have to be truncated, or is not decoded greedily.
        """
        kwargs = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=None)
        if kwargs.get("do_sample"):
            raise CommandError("only greedy decoding is evaluated: do_sample must be false")
        new = int(kwargs["max_gen_toks"])
        request = Request(
            tuple(self.tok_encode(prompt)), new if limit is None else min(new, limit), tuple(until)
        )
        return _whole(request, max_length)

    def choices(
        self, pairs: Sequence[tuple[str, str]], max_length: int
    ) -> list[tuple[Request, list[int]]]:
        """Requests for (context, continuation) pairs, one for each distinct context, and the indices
        of the pairs that each of them scores."""
        return _grouped(self._encoded(pairs), max_length)

    def _encoded(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Tokens of pairs, by the stock class's own rules."""
        caught: list[Any] = []
        instances = [_Arguments(pair) for pair in pairs]
        with patch.object(self, "_loglikelihood_tokens", lambda new, **_: caught.extend(new)):
            super().loglikelihood(instances, disable_tqdm=True)
        return [(tuple(context), tuple(continuation)) for _, context, continuation in caught]

    # Running

    def prefill(self, requests: Sequence[Request]) -> tuple[Prefix, list[tuple[int, ...]]]:
        """The contexts of a batch, densely, and its decode windows."""
        window = min(self.window, len(requests[0].tokens))
        use_arm(self.model, DENSE, 0, self.dense)
        contexts = [request.tokens[:-window] for request in requests]
        room = window + max(request.room for request in requests)
        return Prefix(self.model, contexts, room), [
            request.tokens[-window:] for request in requests
        ]

    def respond(
        self, prefix: Prefix, windows: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[Any]:
        """What each request of a batch asks for: a `Decoded`, or a list of `Scored`."""
        first = requests[0]
        if first.continuations is None:
            return generate(
                self.model,
                self.tokenizer,
                prefix,
                windows,
                max_new_tokens=first.max_new_tokens,
                stop=first.stop,
            )
        return score(self.model, prefix, windows, [r.continuations or () for r in requests])

    def batched(
        self, requests: Sequence[Request], batch_size: int, batch_tokens: int | None = None
    ) -> list[list[int]]:
        """Indices of requests to run together; one at a time where the cache does not allow more."""
        if not has_plain_cache(self.model):
            batch_size = 1
        return list(
            batches(requests, self.window, batch_size=batch_size, batch_tokens=batch_tokens)
        )

    def _run(self, requests: Sequence[Request], name: str, disable_tqdm: bool) -> list[Any]:
        if self.batch_size == "auto":
            raise CommandError("batch_size must be a number: probing for one needs whole logits")
        responses: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc=name, disable=disable_tqdm or self.rank != 0) as bar:
            for batch in self.batched(requests, int(self.batch_size)):
                chosen = [requests[i] for i in batch]
                prefix, windows = self.prefill(chosen)
                use_arm(self.model, self.arm, self.seed, self.dense)
                for i, response in zip(batch, self.respond(prefix, windows, chosen), strict=True):
                    responses[i] = response
                del prefix  # before the next batch is prefilled: a cache can be half of the memory
                bar.update(len(batch))
        return responses

    # lm-eval's interface

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers."""
        prompts = [self.generation(r.args[0], r.args[1], None, self.max_length) for r in requests]
        texts = [decoded.text for decoded in self._run(prompts, "generate_until", disable_tqdm)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        grouped = _grouped([(tuple(c), tuple(x)) for _, c, x in requests], self.max_length)
        answers: list[Any] = [None] * len(requests)
        scored = self._run([request for request, _ in grouped], "loglikelihood", disable_tqdm)
        for (_, indices), scores in zip(grouped, scored, strict=True):
            for i, one in zip(indices, scores, strict=True):
                answers[i] = (one.log_likelihood, one.is_greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refused: it is one prefill, in which no decode step runs."""
        raise NotImplementedError(
            "a rolling log-likelihood is computed by prefill, which this method does not change"
        )


def _parameters(kind: type) -> set[str]:
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return {p.name for p in parameters if p.kind != p.VAR_KEYWORD} - {"self"}


_ARGUMENTS = _SANTA_FIELDS | _LOADING | _parameters(SantaLM) | _parameters(HFLM)


@dataclass
class _Arguments:
    """What the stock class reads of a request."""

    args: tuple[str, str]


def _grouped(
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], max_length: int
) -> list[tuple[Request, list[int]]]:
    """One request for each distinct context, and the indices of the pairs that it scores."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        by_context.setdefault(context, []).append(i)
    return [
        (_whole(Request(c, continuations=tuple(pairs[i][1] for i in x)), max_length), x)
        for c, x in by_context.items()
    ]


def _whole(request: Request, max_length: int) -> Request:
    """The request, if it fits."""
    if not request.tokens:
        raise CommandError("a prompt has no tokens")
    if len(request.tokens) + request.room > max_length:
        raise CommandError(
            f"a prompt of {len(request.tokens)} tokens and {request.room} more would be truncated "
            f"to max_length={max_length}"
        )
    return request


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval lm-eval`: lm-eval's command line, with the model class "santa"."""
    from lm_eval.__main__ import cli_evaluate

    with patch.object(sys, "argv", [prog, *argv]), data.local_data():
        cli_evaluate()
