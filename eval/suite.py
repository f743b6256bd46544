"""Suites: which prompts to run and with which arms, as YAML files in configs/suites/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from santa_hf import SantaConfig

from . import ruler
from .cli import CommandError

__all__ = ["Suite", "TaskSettings"]


@dataclass(frozen=True)
class TaskSettings:
    """One RULER task at one length.

    Attributes:
        task: lm-eval's name of the task.
        length: RULER's length in tokens.
        prompts: how many prompts.
        max_new_tokens: the answer's length at most; never above lm-eval's own limit.
    """

    task: str
    length: int
    prompts: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        ruler.check(self.task, self.length, self.prompts)
        _at_least_one("max_new_tokens", self.max_new_tokens)


@dataclass(frozen=True)
class Suite:
    """A comparison of dense decoding with sampled decoding on the same prompts.

    Attributes:
        tasks: what to run.
        samples: draws per query head and step, one sampled arm each.
        estimator: estimator of the sampled arms.
        seed: key of the draws.
        data_seed: seed of the prompts.
        window: prompt tokens that go through the decode path.
        chat: wrap prompts in the chat template.

    Raises:
        TypeError, ValueError: a field has the wrong type or a value that is not allowed.
    """

    tasks: tuple[TaskSettings, ...]
    samples: tuple[int, ...]
    estimator: str = "systematic"
    seed: int = 0
    data_seed: int = 0
    window: int = 1
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not self.samples:
            raise ValueError("a suite needs at least one task and one number of samples")
        if len(set(self.samples)) < len(self.samples):
            raise ValueError(f"samples names a number twice: {list(self.samples)}")
        _at_least_one("window", self.window)
        if not isinstance(self.chat, bool):
            raise TypeError(f"chat must be true or false, got {self.chat!r}")
        self.arms()

    def arms(self) -> dict[str, SantaConfig | None]:
        """Configuration by name of the arm; None for dense, which is the model's own SDPA."""
        arms: dict[str, SantaConfig | None] = {"dense": None}
        for samples in self.samples:
            # Strict: a step that would go dense unseen must not pass for a sampled one.
            arms[f"santa-{samples}"] = SantaConfig(
                samples=samples, estimator=self.estimator, seed=self.seed, strict=True
            )
        return arms

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike[str], *, prompts: int | None = None, **overrides: Any
    ) -> Suite:
        """Read a suite; `overrides` replace its fields, `prompts` that of every task.

        Raises:
            CommandError: no such file, not YAML, or not a valid suite; the message names the file.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
            _refuse_unknown(values, cls)
            changes = {} if prompts is None else {"prompts": prompts}
            tasks = []
            for settings in values.pop("tasks", ()):
                _refuse_unknown(settings, TaskSettings)
                tasks.append(TaskSettings(**{**settings, **changes}))
            samples = tuple(values.pop("samples", ()))
            return cls(**{"tasks": tuple(tasks), "samples": samples, **values, **overrides})
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise CommandError(f"{os.fspath(path)}: {error}") from error


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _refuse_unknown(values: Any, kind: type) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a mapping, got {values!r}")
    allowed = [field.name for field in fields(kind)]
    for name in values:
        if name not in allowed:
            raise ValueError(f"no field {name!r}; there are {', '.join(allowed)}")
