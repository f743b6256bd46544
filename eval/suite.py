"""Suites: which tasks to run, with which arms and seeds, as YAML files in configs/suites/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .arms import arms_from_settings, parse_arm
from .cli import CommandError
from .results import Arm

__all__ = ["SUITES", "Suite", "TaskSettings", "find_suite"]

SUITES = Path(__file__).parent.parent / "configs/suites"
# Below this, lm-eval's generator of ruler_vt never ends.
MIN_LENGTH = 1024


@dataclass(frozen=True)
class TaskSettings:
    """One task of lm-eval, or one of its groups, at one length.

    Attributes:
        task: lm-eval's name of a task or a group.
        length: context length in tokens, for RULER tasks alone.
        limit: documents of each task, the first ones; None for all.
        num_fewshot: examples in the prompt; None for the task's own number.
        max_new_tokens: cuts lm-eval's limit on an answer, never raises it; None leaves it.
        window: prompt tokens that go through the decode path, at least 1; None for the suite's.
    """

    task: str
    length: int | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise TypeError(f"task must be the name of a task, got {self.task!r}")
        for name, low in (
            ("length", MIN_LENGTH),
            ("limit", 1),
            ("num_fewshot", 0),
            ("max_new_tokens", 1),
            ("window", 1),
        ):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low)


@dataclass(frozen=True)
class Suite:
    """Tasks, and the arms to compare on them.

    Attributes:
        tasks: what to run.
        arms: how to decode, by name; dense is always there, and first.
        seeds: keys of the draws; arms that draw nothing run once.
        window: prompt tokens that go through the decode path, at least 1, where a task does not say.
        chat: wrap prompts in the chat template.
        data_seed: seed of RULER's samples.

    Raises:
        TypeError, ValueError: a field has the wrong type or a value that is not allowed.
    """

    tasks: tuple[TaskSettings, ...]
    arms: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    window: int = 1
    chat: bool = False
    data_seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("a suite needs at least one task")
        keys = [(settings.task, settings.length) for settings in self.tasks]
        if len(set(keys)) < len(keys):
            raise ValueError("tasks names a task twice at one length")
        if not isinstance(self.arms, Mapping):
            raise TypeError(f"arms must map names to settings, got {self.arms!r}")
        arms_from_settings(self.arms)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one, each once, got {list(self.seeds)}")
        for seed in self.seeds:
            _integer("seeds", seed, 0)
        _integer("window", self.window, 1)
        _integer("data_seed", self.data_seed, 0)
        if not isinstance(self.chat, bool):
            raise TypeError(f"chat must be true or false, got {self.chat!r}")

    def made_arms(self) -> dict[str, Arm]:
        """The arms by name, dense first."""
        return arms_from_settings(self.arms)

    def settings(self) -> dict[str, Any]:
        """What decides on documents and dense answers, as plain data: all but arms and seeds."""
        return {
            "tasks": [
                {**asdict(settings), "window": settings.window or self.window}
                for settings in self.tasks
            ],
            "window": self.window,
            "chat": self.chat,
            "data_seed": self.data_seed,
        }

    @classmethod
    def from_yaml(
        cls,
        path: str | os.PathLike[str],
        *,
        limit: int | None = None,
        window: int | None = None,
        arms: list[str] | None = None,
        **overrides: Any,
    ) -> Suite:
        """Read a suite.

        Args:
            path: the YAML file.
            limit, window: replace those of every task.
            arms: replace the suite's; either the name of one of them, or see `parse_arm`.
            overrides: replace other fields.

        Raises:
            CommandError: no such file, not YAML, or not a valid suite; the message names the file.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            _refuse_unknown(values, cls)
            given = {"limit": limit, "window": window}
            changes = {name: value for name, value in given.items() if value is not None}
            tasks = []
            for settings in values.pop("tasks", None) or ():
                _refuse_unknown(settings, TaskSettings)
                tasks.append(TaskSettings(**{**settings, **changes}))
            values["seeds"] = tuple(values.get("seeds", (0,)))
            if arms is not None:
                known = {"dense": None, **values.get("arms", {})}
                chosen = {}
                for text in arms:
                    name, settings = parse_arm(text)
                    if name in chosen:
                        raise ValueError(f"arm {name!r} is given twice")
                    if settings is None and name not in known:
                        raise ValueError(f"no arm {name!r}; there are {', '.join(known)}")
                    chosen[name] = known[name] if settings is None else settings
                values["arms"] = chosen
            if window is not None:
                values["window"] = window
            return cls(**{**values, "tasks": tuple(tasks), **overrides})
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise CommandError(f"{os.fspath(path)}: {error}") from error


def find_suite(name: str) -> Path:
    """The file of a suite: a path that ends in .yaml, or a name in configs/suites.

    Raises:
        CommandError: there is none; the message says which there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise CommandError(f"no suite {name!r}: give the path of a YAML file, or one of {names}")
    return path


def _integer(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def _refuse_unknown(values: Any, kind: type) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a mapping, got {values!r}")
    allowed = [field.name for field in fields(kind)]
    for name in values:
        if name not in allowed:
            raise ValueError(f"no field {name!r}; there are {', '.join(allowed)}")
