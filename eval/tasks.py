"""lm-eval's tasks as documents to answer: its prompts, targets, filters, metrics and versions."""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data, ruler
from .cli import CommandError
from .results import Document, Metric, Task
from .suite import TaskSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Documents", "Response", "check_overlap", "load_documents"]

# Folders of lm-eval's tasks that are looked in first: indexing all of them takes half a minute.
_COMMON = (ruler.FOLDER, "gsm8k", "mmlu/default")
# lm-eval's own seed of few-shot examples.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Response:
    """What a model made of one document.

    Attributes:
        values: for each request of the document, what lm-eval expects of a model: the generated text,
            or (log-likelihood, whether it is what greedy decoding gives).
        n_tokens: tokens generated, or tokens of all continuations.
    """

    values: tuple[Any, ...]
    n_tokens: int


class Documents:
    """The documents of one task.

    Attributes:
        task: the task as results describe it.
        ids: lm-eval's index of each document.
        requests: for each document, the arguments of lm-eval's requests: [(prompt, settings)] for
            generation, (context, continuation) pairs for choices.
        max_new_tokens: cuts the answers' limit; None leaves it.
    """

    def __init__(
        self, loaded: Any, length: int | None, group: str | None, max_new_tokens: int | None
    ) -> None:
        self._loaded = loaded
        self.max_new_tokens = max_new_tokens
        self._instances: dict[int, list[Any]] = {}
        for instance in loaded.instances:
            self._instances.setdefault(instance.doc_id, []).append(instance)
        for instances in self._instances.values():
            instances.sort(key=lambda instance: instance.idx)
        self.ids = sorted(self._instances)
        self.requests = [[i.args for i in self._instances[doc_id]] for doc_id in self.ids]
        self._hashes = {doc_id: self._hash(doc_id) for doc_id in self.ids}
        empty = Response(
            tuple("" if self._generates else (-1.0, False) for _ in self.requests[0]), 0
        )
        # Names of the metrics, and what does not change with an arm.
        names = list(self._scores(dict.fromkeys(self.ids[:1], empty), length)[0][1])
        higher = loaded.higher_is_better()
        self.task = Task(
            name=loaded.task_name,
            version=float(loaded.VERSION),
            length=length,
            group=group,
            output_type=loaded.OUTPUT_TYPE,
            num_fewshot=int(loaded.config.num_fewshot or 0),
            documents_sha256=hashlib.sha256("".join(self._hashes.values()).encode()).hexdigest(),
            main_metric=names[0],
            higher_is_better={name: bool(higher.get(name.split(",")[0], True)) for name in names},
            chance=0.0 if self._generates else statistics.fmean(1 / len(r) for r in self.requests),
        )

    @property
    def _generates(self) -> bool:
        return self._loaded.OUTPUT_TYPE == "generate_until"

    def __len__(self) -> int:
        return len(self.ids)

    def _hash(self, doc_id: int) -> str:
        first = self._instances[doc_id][0]
        target = self._loaded.doc_to_target(first.doc)
        text = repr(([i.args[0] for i in self._instances[doc_id]], target))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def evaluate(
        self, responses: Mapping[int, Response]
    ) -> tuple[dict[str, Metric], list[Document]]:
        """lm-eval's metrics of the responses to all documents, by doc_id.

        A metric that is a mean over documents has that mean's standard error.
        """
        aggregation = self._loaded.aggregation()
        documents = []
        values: dict[str, list[Any]] = {}
        for doc_id, scores in self._scores(responses, self.task.length):
            for name, value in scores.items():
                values.setdefault(name, []).append(value)
            numbers = {n: float(v) for n, v in scores.items() if isinstance(v, (int, float))}
            documents.append(
                Document(
                    doc_id,
                    self._hashes[doc_id],
                    numbers,
                    self._output(doc_id, responses[doc_id]),
                    responses[doc_id].n_tokens,
                )
            )
        metrics = {}
        for name, items in values.items():
            aggregate = aggregation.get(name.split(",")[0], statistics.fmean)
            metrics[name] = Metric(float(aggregate(items)), _standard_error(items))
        return metrics, documents

    def _scores(
        self, responses: Mapping[int, Response], length: int | None
    ) -> list[tuple[int, dict[str, Any]]]:
        """Document ids and their scores by "metric" or "metric,filter", through lm-eval's filters."""
        used = []
        for doc_id, response in responses.items():
            for instance, value in zip(self._instances[doc_id], response.values, strict=True):
                instance.resps, instance.filtered_resps = [value], {}
                used.append(instance)
        for filters in self._loaded._filters:
            filters.apply(used)
        found = []
        for doc_id in sorted(responses):
            instances = self._instances[doc_id]
            scores = {}
            for name in instances[0].filtered_resps:
                values = [instance.filtered_resps[name] for instance in instances]
                for metric, value in self._loaded.process_results(instances[0].doc, values).items():
                    # RULER marks the lengths that a document does not have.
                    if length is None or metric == str(length):
                        scores[metric if name == "none" else f"{metric},{name}"] = value
            found.append((doc_id, scores))
        return found

    def _output(self, doc_id: int, response: Response) -> str:
        if self._generates:
            return str(response.values[0])
        best = max(range(len(response.values)), key=lambda i: response.values[i][0])
        return str(self._instances[doc_id][best].args[1]).strip()


def _standard_error(items: Sequence[Any]) -> float | None:
    """Standard error of the mean of numbers; None for one of them, or for anything else."""
    if len(items) < 2 or not all(isinstance(item, (int, float)) for item in items):
        return None
    return statistics.stdev(map(float, items)) / math.sqrt(len(items))


def load_documents(
    settings: TaskSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_seed: int = 0,
    chat: bool = False,
) -> list[Documents]:
    """The documents of a task, or of every task of a group.

    Args:
        settings: task, length and limits.
        tokenizer: the model's, loaded from a directory or the hub.
        data_seed: seed of RULER's samples.
        chat: wrap prompts in the tokenizer's chat template.

    Raises:
        CommandError: lm-eval has no such task, the settings do not fit it, or data are missing.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise CommandError(
            f"chat is true, and the tokenizer of {tokenizer.name_or_path} has no chat template"
        )
    # What lm-eval prints and logs while it builds tasks is not for the user of a comparison.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), data.local_data():
        manager, folder = _manager(settings.task)
        is_ruler = folder == ruler.FOLDER
        _check(settings, is_ruler)
        group: str | None
        if is_ruler:
            assert settings.length is not None
            count = settings.limit or ruler.MOST
            names = ruler.names(settings.task)
            # Also of a task alone: what a suite picks of them is scored together, at every length.
            group = ruler.FOLDER
            tasks = [
                ruler.task(
                    name,
                    ruler.documents(name, settings.length, count, tokenizer, seed=data_seed),
                )
                for name in names
            ]
        else:
            group, tasks = _load(manager, settings)
        found = []
        for task in tasks:
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            if settings.num_fewshot is not None:
                task.set_config("num_fewshot", settings.num_fewshot)
            if task.OUTPUT_TYPE not in ("generate_until", "multiple_choice", "loglikelihood"):
                raise CommandError(
                    f"task {task.task_name!r} is {task.OUTPUT_TYPE}, which is scored in one prefill: "
                    "no decode step runs"
                )
            task.build_all_requests(
                limit=settings.limit,
                apply_chat_template=chat,
                chat_template=_chat_template(tokenizer) if chat else None,
                tokenizer_name=tokenizer.name_or_path if chat else "",
            )
            found.append(Documents(task, settings.length, group, settings.max_new_tokens))
    return found


def check_overlap(suite: Sequence[TaskSettings]) -> None:
    """Refuse tasks of which one is part of another, at one length: they would share their results.

    Raises:
        CommandError: two entries hold the same task; the message names both. Or there is no such task.
    """
    first: dict[tuple[str, int | None], str] = {}
    for settings in suite:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            manager, _ = _manager(settings.task)
            members = _members(manager, settings.task)
        for name in members:
            other = first.setdefault((name, settings.length), settings.task)
            if other != settings.task:
                at = "" if settings.length is None else f" at {settings.length} tokens"
                raise CommandError(
                    f"tasks {other!r} and {settings.task!r} both come to {name!r}{at}: leave one out"
                )


def _members(manager: Any, name: str) -> list[str]:
    """The tasks of a group or a tag, through all levels, without loading any; of a task, itself."""
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(name)
    if entry is not None and entry.kind == Kind.TAG:
        inner: list[Any] = sorted(entry.tags)
    elif entry is not None and entry.kind == Kind.GROUP and entry.yaml_path is not None:
        listed = load_yaml(entry.yaml_path, resolve_func=False).get("task") or []
        inner = [listed] if isinstance(listed, str) else listed
    else:
        return [name]
    names = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in inner]
    # A group may hold tasks of its own making, which have no other name.
    return [m for n in names if isinstance(n, str) and n != name for m in _members(manager, n)]


def _manager(name: str) -> tuple[Any, str]:
    """A task manager that knows a task, and the folder of the task within lm-eval's."""
    tasks = importlib.import_module("lm_eval.tasks")
    root = Path(tasks.__file__ or "").parent
    for paths in (tuple(root / folder for folder in _COMMON), (root,)):
        manager = _indexed(paths)
        entry = manager.task_index.get(name)
        if entry is not None:
            path = entry.yaml_path
            return manager, "" if path is None else str(path.parent.relative_to(root))
    near = [other for other in manager.all_tasks if name.lower() in other.lower()][:8]
    hint = f"; did you mean one of {', '.join(near)}?" if near else ""
    raise CommandError(f"lm-eval has no task or group {name!r}{hint}")


@cache
def _indexed(paths: tuple[Path, ...]) -> Any:
    tasks = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_defaults=False, include_path=list(paths))


def _check(settings: TaskSettings, is_ruler: bool) -> None:
    if is_ruler and settings.length is None:
        raise CommandError(f"{settings.task} needs a length in tokens")
    if is_ruler and settings.num_fewshot:
        raise CommandError(f"{settings.task} takes no few-shot examples")
    if not is_ruler and settings.length is not None:
        raise CommandError(f"{settings.task} is not a RULER task and takes no length")


def _load(manager: Any, settings: TaskSettings) -> tuple[str | None, list[Any]]:
    try:
        loaded = manager.load([settings.task])
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{settings.task} cannot be loaded: {error}") from error
    group = settings.task if settings.task in loaded["groups"] else None
    return group, list(loaded["tasks"].values())


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
