"""Answers of a (task, arm, seed) that is not finished: one file for each batch, to go on from.

They lie in a folder of the run that no reader of results looks at, and go when the result is written:

    .partial/<task key>/<arm name>/seed-<n>/<any>.json

They spare work and nothing else: a file that cannot be read, or that is of another run, is as good as
none, and its documents are answered again.
"""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cli import CommandError
from .results import read_json, write_json

__all__ = ["Progress", "load", "remove", "save"]

FOLDER = ".partial"


@dataclass
class Progress:
    """What is done of a (task, arm, seed).

    Attributes:
        answers: for each document, what it got by the index of its request in lm-eval's order.
        n_tokens: for each document, tokens generated or scored.
        counters, fallbacks: what the attention layers did.
        seconds: wall time of the decode steps.
        prefill_seconds: wall time of the prefills before them.
        tokens: tokens that went through a decode step.
    """

    answers: dict[int, dict[int, Any]] = field(default_factory=dict)
    n_tokens: Counter[int] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    tokens: int = 0

    @property
    def answered(self) -> set[tuple[int, int]]:
        """(document, request) pairs."""
        return {(doc_id, i) for doc_id, answers in self.answers.items() for i in answers}

    def add(self, other: Progress) -> None:
        """Add what is done elsewhere.

        Raises:
            RuntimeError: some of it is done here too.
        """
        twice = self.answered & other.answered
        if twice:
            raise RuntimeError(f"documents {sorted({i for i, _ in twice})} were answered twice")
        for doc_id, answers in other.answers.items():
            self.answers.setdefault(doc_id, {}).update(answers)
        for mine, others in (
            (self.n_tokens, other.n_tokens),
            (self.counters, other.counters),
            (self.fallbacks, other.fallbacks),
        ):
            mine.update(others)  # type: ignore[arg-type]
        self.seconds += other.seconds
        self.prefill_seconds += other.prefill_seconds
        self.tokens += other.tokens


@dataclass(frozen=True)
class _File:
    """`Progress` as JSON has it, whose keys are strings.

    Attributes:
        of: what the answers belong to.
        answers: [document, request, answer]; a score as [hexadecimal float, greedy], which keeps
            every bit, infinity included.
    """

    of: dict[str, Any]
    answers: list[list[Any]]
    n_tokens: dict[str, int]
    counters: dict[str, int]
    fallbacks: dict[str, int]
    seconds: float
    prefill_seconds: float
    tokens: int


def _folder(run: Path, task_key: str, arm: str, seed: int) -> Path:
    return run / FOLDER / task_key / arm / f"seed-{seed}"


def save(
    run: Path, task_key: str, arm: str, seed: int, of: Mapping[str, Any], done: Progress
) -> None:
    """Write what a batch added; the file appears complete or not at all.

    Args:
        run: directory of the run.
        task_key, arm, seed: what was answered.
        of: plain data that says what the answers belong to, for `load`.
        done: the answers.

    Raises:
        OSError: it cannot be written.
    """
    values = _File(
        of=dict(of),
        answers=[
            [doc_id, i, answer if isinstance(answer, str) else [answer[0].hex(), answer[1]]]
            for doc_id, answers in done.answers.items()
            for i, answer in answers.items()
        ],
        n_tokens={str(doc_id): n for doc_id, n in done.n_tokens.items()},
        counters=dict(done.counters),
        fallbacks=dict(done.fallbacks),
        seconds=done.seconds,
        prefill_seconds=done.prefill_seconds,
        tokens=done.tokens,
    )
    write_json(_folder(run, task_key, arm, seed) / f"{uuid.uuid4().hex}.json", vars(values))


def load(
    run: Path, task_key: str, arm: str, seed: int, of: Mapping[str, Any]
) -> dict[str, Progress]:
    """What is kept of a (task, arm, seed), by file name; no answer twice."""
    found: dict[str, Progress] = {}
    known: set[tuple[int, int]] = set()
    for path in sorted(_folder(run, task_key, arm, seed).glob("[!.]*.json")):
        # Whatever is wrong with a file, its documents can be answered again.
        with suppress(CommandError, ValueError, TypeError, LookupError):
            values: _File = read_json(_File, path)
            done = _progress(values)
            if values.of == dict(of) and known.isdisjoint(done.answered):
                found[path.name] = done
                known |= done.answered
    return found


def _progress(values: _File) -> Progress:
    answers: dict[int, dict[int, Any]] = {}
    for doc_id, i, answer in values.answers:
        if not isinstance(answer, str):
            answer = (float.fromhex(answer[0]), bool(answer[1]))
        answers.setdefault(doc_id, {})[i] = answer
    return Progress(
        answers=answers,
        n_tokens=Counter({int(doc_id): n for doc_id, n in values.n_tokens.items()}),
        counters=Counter(values.counters),
        fallbacks=Counter(values.fallbacks),
        seconds=values.seconds,
        prefill_seconds=values.prefill_seconds,
        tokens=values.tokens,
    )


def remove(run: Path, task_key: str, arm: str, seed: int) -> None:
    """Forget what is kept of a (task, arm, seed), and the folders that are empty then."""
    folder = _folder(run, task_key, arm, seed)
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent, run / FOLDER):
        with suppress(OSError):  # not empty
            parent.rmdir()
