"""RULER prompts from lm-eval's own task objects: seeded, hashed, and built without a download."""

from __future__ import annotations

import hashlib
import io
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OFFLINE_TASKS", "RulerPrompts", "build", "check"]

# What these need comes with lm-eval and wonderwords; the other RULER tasks read data sets.
OFFLINE_TASKS = ("niah_single_1", "niah_multikey_2", "ruler_vt")

# Below this, lm-eval's generator of ruler_vt never ends.
_MIN_LENGTH = 1024
_MAX_PROMPTS = 500  # what lm-eval generates


@dataclass(frozen=True)
class RulerPrompts:
    """Prompts of one RULER task at one length.

    Attributes:
        task: lm-eval's name of the task.
        version: lm-eval's version of the task.
        length: RULER's length in tokens, which counts the answer but neither the answer's prefix
            nor a chat template.
        prompts: the text of each prompt, the answer's prefix included.
        max_new_tokens: the length to which lm-eval lets an answer grow.
        stop: strings that end an answer, besides the end-of-text token.
    """

    task: str
    version: float
    length: int
    prompts: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    _task: Any = field(repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hash of all prompts and targets, in order."""
        digest = hashlib.sha256()
        for instance in self._task.instances:
            digest.update(repr((instance.args[0], list(instance.doc["outputs"]))).encode())
        return digest.hexdigest()

    def score(self, index: int, answer: str) -> float:
        """lm-eval's score of an answer to prompt `index`: the share of targets it contains."""
        doc = self._task.instances[index].doc
        return float(self._task.process_results(doc, [answer])[str(self.length)])


def check(task: str, length: int, prompts: int) -> None:
    """Raise ValueError unless lm-eval can build these prompts without a download."""
    if task not in OFFLINE_TASKS:
        raise ValueError(f"task must be one of {', '.join(OFFLINE_TASKS)}, got {task!r}")
    for name, value, low, high in (
        ("length", length, _MIN_LENGTH, 2**20),
        ("prompts", prompts, 1, _MAX_PROMPTS),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} must be an integer in [{low}, {high}], got {value!r}")


def build(
    task: str,
    length: int,
    prompts: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    chat: bool = False,
) -> RulerPrompts:
    """The first prompts of a RULER task at one length.

    lm-eval draws RULER's data from the global generators, so they would depend on what ran before:
    here they are seeded by (seed, task, length), and restored afterwards.

    Args:
        task: one of `OFFLINE_TASKS`.
        length: tokens by RULER's count, at least 1024.
        prompts: how many, 1 to 500.
        tokenizer: loaded from a local directory, from which lm-eval loads it again.
        seed: seed of the data.
        chat: wrap each prompt in the tokenizer's chat template (lm-eval's `apply_chat_template`).

    Raises:
        ValueError: an argument is out of its range.
    """
    check(task, length, prompts)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        loaded = _load(task, length, tokenizer.name_or_path, seed)
        loaded.build_all_requests(
            limit=prompts,
            apply_chat_template=chat,
            chat_template=_chat_template(tokenizer) if chat else None,
        )
    arguments = [instance.args for instance in loaded.instances]
    settings = arguments[0][1]
    return RulerPrompts(
        task=task,
        version=float(loaded.VERSION),
        length=length,
        prompts=tuple(prompt for prompt, _ in arguments),
        max_new_tokens=settings["max_gen_toks"],
        stop=tuple(settings["until"]),
        _task=loaded,
    )


def _load(task: str, length: int, tokenizer: str, seed: int) -> Any:
    """The task with its documents, drawn from generators seeded by (seed, task, length)."""
    state = random.getstate(), np.random.get_state()
    key = hashlib.sha256(f"{seed}/{task}/{length}".encode()).digest()
    try:
        # lm-eval's files fetch sentence-splitting data when imported, which these tasks never use.
        with patch("nltk.download"):
            import lm_eval.tasks.ruler.prepare_niah as generator
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_defaults=False,  # indexing all of lm-eval's tasks takes a while
            include_path=Path(generator.__file__).parent,
            metadata={"tokenizer": tokenizer, "max_seq_lengths": [length]},
        )
        random.seed(key)
        np.random.seed(np.frombuffer(key, np.uint32))
        return manager.load([task])["tasks"][task]
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        # A prompt that ends in the answer's prefix leaves the assistant's turn open.
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return render
