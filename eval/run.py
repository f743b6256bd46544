"""Run the arms of a suite on the same documents: one result file for each (task, arm, seed).

Every prompt is prefilled once, densely, and every arm and seed decodes from that cache. A result is
written as soon as its last document is answered, and what a batch added to an unfinished one before the
next begins; started again, a run goes on with what is not there.

Started by `accelerate launch`, processes share the documents of every task. The first one alone reads
and writes the results, so that machines need no common disk; every one keeps what it has of unfinished
ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import santa_hf

from . import data, partial, provenance, results
from .arms import check_device, check_model, use_arm
from .cli import CommandError
from .compare import compare, remarks, table, unfinished
from .decode import Decoded, Prefix, count_value_rows
from .models import adapters_config, changed_config
from .partial import Progress
from .processes import device_name, processes
from .results import Arm, Counters, Header, Result
from .suite import SUITES, Suite, find_suite
from .tasks import Documents, Response, check_overlap, load_documents

if TYPE_CHECKING:
    from .lm import Request

__all__ = ["Options", "main", "run"]

_T = TypeVar("_T")

_PACKAGES = (
    "transformers",
    "lm-eval",
    "datasets",
    "accelerate",
    "peft",
    "triton",
    "wonderwords",
    "nltk",
    "numpy",
    "santa-hf",
)
# A decode step on a GPU costs much the same for one document as for hundreds.
_GPU_BATCH = 512
# What RULER's length leaves out: the answer's prefix, the chat template, and what FWE overshoots by.
_RULER_SLACK = 512
# lm-eval's limit on an answer where a task has none.
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """How to run, which changes no result beyond rounding.

    Attributes:
        device: "cuda", "cpu", ...
        batch_size: documents decoded together at most.
        batch_tokens: cached tokens in a batch at most; one document may exceed it.
        time_limit: seconds after which nothing is begun; the batch that an arm and seed are at is
            finished and kept. None for no limit.
        progress: show a progress bar.
    """

    device: str = "cpu"
    batch_size: int = 16
    batch_tokens: int = 131072
    time_limit: float | None = None
    progress: bool = True


@dataclass
class _Work:
    """What is left to do of a task.

    Attributes:
        documents: of the task.
        window: prompt tokens that go through the decode path.
        missing: arms and seeds without a result.
        kept: by arm and seed, what this process answers for of an earlier start.
        answered: by arm and seed, (document, request) pairs that any process has kept.
    """

    documents: Documents
    window: int
    missing: list[tuple[Arm, int]]
    kept: dict[tuple[str, int], list[Progress]] = field(default_factory=dict)
    answered: dict[tuple[str, int], set[tuple[int, int]]] = field(default_factory=dict)


def run(
    model: dict[str, Any],
    suite: Suite,
    directory: Path,
    options: Options,
) -> list[Result]:
    """Run a suite, and write its results to a directory.

    Args:
        model: what to load: "name", and if given "revision", "adapter", "dtype", "model_config".
        suite: tasks, arms and seeds.
        directory: of the run; one that holds results of the same model and settings is gone on with.
        options: how to run.

    Returns:
        In the first process, every result of the directory; in others, none.

    Raises:
        CommandError: something is not valid, or does not belong to this run; raised before the model
            is loaded. Or a result cannot be written; those written before are still there.
    """
    started = time.monotonic()
    _check_device(options.device)
    for arm in suite.made_arms().values():
        try:
            check_device(arm, options.device)
        except ValueError as error:
            raise CommandError(str(error)) from error
    state = processes(options.device)
    header = _header(model, suite)
    header, done = _in_the_first(lambda: _open(directory, header))
    works, keys = _in_all(lambda: _prepare(model, suite, done))
    hashes = [work.documents.task.documents_sha256 for work in works]
    if any(other != hashes for other in gather_object([hashes])):
        raise CommandError("the processes have other documents: their data or packages differ")
    _in_the_first(lambda: _check_documents(works, directory, done))
    works = [work for work in works if work.missing]
    if works:
        header = replace(header, tasks=keys)
        _run_all(model, suite, directory, options, header, works, started)
    state.wait_for_everyone()
    return results.load_results(directory)[1] if state.is_main_process else []


def _in_the_first(action: Callable[[], _T]) -> _T:
    """What an action gives in the first process, in every one; so with a CommandError."""
    outcome: list[Any] = [None, None]
    if processes().is_main_process:
        outcome = _outcome(action)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise CommandError(outcome[1])
    return outcome[0]


def _in_all(action: Callable[[], _T]) -> _T:
    """What an action gives in this process; a CommandError of one is raised in every one."""
    found, problem = _outcome(action)
    for one in gather_object([problem]):
        if one is not None:
            raise CommandError(one)
    return found


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except CommandError as error:
        return [None, str(error)]


def _prepare(
    model: dict[str, Any], suite: Suite, done: set[tuple[str, str, int]]
) -> tuple[list[_Work], list[str]]:
    """All tasks, and their keys, checked as far as it goes without the model."""
    tokenizer = _tokenizer(model)
    longest = _check_model(model, suite, tokenizer)
    check_overlap(suite.tasks)
    works: list[_Work] = []
    for settings in suite.tasks:
        for documents in load_documents(
            settings, tokenizer, data_seed=suite.data_seed, chat=suite.chat
        ):
            missing = [
                (arm, seed)
                for arm in suite.made_arms().values()
                for seed in ((0,) if arm.deterministic else suite.seeds)
                if (documents.task.key, arm.name, seed) not in done
            ]
            if missing:
                _check_lengths(documents, tokenizer, longest)
            works.append(_Work(documents, settings.window or suite.window, missing))
    keys = [work.documents.task.key for work in works]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise CommandError(f"two tasks of the suite come to {twice[0]!r}: leave one out")
    return works, keys


def _run_all(
    model: dict[str, Any],
    suite: Suite,
    directory: Path,
    options: Options,
    header: Header,
    works: Sequence[_Work],
    started: float,
) -> None:
    state = processes()
    weights = provenance.weights(model)
    _in_the_first(lambda: results.check_weights(directory, header, weights))
    _find_kept(works, directory, header, weights)
    lm = _load(model, options)
    described = _model_provenance(lm, weights, state.num_processes)
    revision = {"model_revision": described["model_revision"]}
    _in_the_first(lambda: results.check_weights(directory, header, revision))
    header = replace(header, provenance=header.provenance | described)
    _in_the_first(lambda: _save_header(directory, header))
    runners = _in_all(lambda: [_TaskRunner(lm, work, options, header, directory) for work in works])
    # The first process's share: the others have as much to do.
    bar = tqdm(
        total=sum(runner.prompts for runner in runners),
        unit="prompt",
        disable=not options.progress or not state.is_main_process,
        smoothing=0.1,
    )
    deadline = None if options.time_limit is None else started + options.time_limit
    with bar:
        for runner in runners:
            bar.set_postfix_str(runner.work.documents.task.key)
            for arm, seed, result in runner.results(bar, deadline):
                _in_the_first(lambda result=result: _save(directory, result))  # type: ignore[misc]
                partial.remove(directory, runner.work.documents.task.key, arm.name, seed)
            if runner.stopped:
                if state.is_main_process:
                    bar.write(f"stopped by the time limit of {options.time_limit:g} s")
                break


def _save_header(directory: Path, header: Header) -> None:
    try:
        results.save_header(directory, header)
    except OSError as error:
        raise CommandError(f"{directory} cannot be written: {error}") from error


def _save(directory: Path, result: Result) -> None:
    try:
        results.save_result(directory, result)
    except OSError as error:
        raise CommandError(
            f"{directory}: a result cannot be written: {error}; those finished before are kept, and the "
            "same command goes on from there"
        ) from error


def _belongs(
    documents: Documents, arm: Arm, header: Header, weights: Mapping[str, Any]
) -> dict[str, Any]:
    """What answers that are kept belong to."""
    return {
        "config_hash": header.config_hash,
        "documents_sha256": documents.task.documents_sha256,
        "arm": {"method": arm.method, "config": arm.config},
        **weights,
    }


def _find_kept(
    works: Sequence[_Work], directory: Path, header: Header, weights: Mapping[str, Any]
) -> None:
    """Give every work what was kept of it. Of processes that see the same file, one answers for it."""
    found = {}
    for work in works:
        key = work.documents.task.key
        for arm, seed in work.missing:
            of = _belongs(work.documents, arm, header, weights)
            for name, progress in partial.load(directory, key, arm.name, seed, of).items():
                found[key, arm.name, seed, name] = progress
    mine = processes().process_index
    theirs = {place: progress.answered for place, progress in found.items()}
    taken: dict[tuple[str, str, int], set[tuple[int, int]]] = {}
    for rank, places in enumerate(gather_object([theirs])):
        for place, answered in places.items():
            known = taken.setdefault(place[:3], set())
            if not known.isdisjoint(answered):
                continue
            known |= answered
            if rank == mine:
                work = next(w for w in works if w.documents.task.key == place[0])
                work.kept.setdefault(place[1:3], []).append(found[place])
    for work in works:
        key = work.documents.task.key
        work.answered = {
            (arm.name, seed): taken.get((key, arm.name, seed), set()) for arm, seed in work.missing
        }


class _TaskRunner:
    """Runs the arms of one task on this process's share of its documents.

    Raises:
        CommandError: a prompt would have to be truncated; the message names task and document.
    """

    def __init__(
        self, lm: Any, work: _Work, options: Options, header: Header, directory: Path
    ) -> None:
        state = processes()
        self.lm, self.work, self.options, self.header = lm, work, options, header
        self.directory = directory
        self.stopped = False
        documents = work.documents
        limit = _limit(documents, lm.max_length)
        # Shared by the rank over all machines, one document each in turn.
        mine = range(state.process_index, len(documents), state.num_processes)
        # Of each request, its document and which of lm-eval's requests of that document it answers.
        self.requests: list[Request] = []
        self.owners: list[tuple[int, Sequence[int]]] = []
        for i in mine:
            arguments = documents.requests[i]
            try:
                if documents.task.output_type == "generate_until":
                    new = [(lm.generation(*arguments[0], documents.max_new_tokens, limit), [0])]
                else:
                    new = lm.choices(arguments, limit)
            except CommandError as error:
                raise CommandError(
                    f"{documents.task.key}, document {documents.ids[i]}: {error}"
                ) from error
            self.requests += [request for request, _ in new]
            self.owners += [(documents.ids[i], indices) for _, indices in new]
        # Of each request, the arms and seeds that have not answered it.
        self.open = [
            tuple(
                (arm.name, seed)
                for arm, seed in work.missing
                if not work.answered.get((arm.name, seed), set()).issuperset(
                    (doc_id, index) for index in indices
                )
            )
            for doc_id, indices in self.owners
        ]

    @property
    def prompts(self) -> int:
        """Requests to answer, over arms and seeds."""
        return sum(map(len, self.open))

    def _batches(self) -> list[tuple[list[int], set[tuple[str, int]]]]:
        """Requests to run together, and the arms and seeds that have not answered them: one batch
        may have been left half done."""
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for i, needed in enumerate(self.open):
            if needed:
                groups.setdefault(needed, []).append(i)
        found = []
        for needed, indices in sorted(groups.items(), key=lambda item: len(item[0])):
            chosen = [self.requests[i] for i in indices]
            options = self.options
            for batch in self.lm.batched(chosen, options.batch_size, options.batch_tokens):
                found.append(([indices[i] for i in batch], set(needed)))
        return found

    def results(self, bar: Any, deadline: float | None) -> Iterator[tuple[Arm, int, Result | None]]:
        """Arms, seeds and, in the first process, their results, in the order of finishing."""
        self.lm.window = self.work.window
        progress = {(arm.name, seed): Progress() for arm, seed in self.work.missing}
        for key, kept in self.work.kept.items():
            for one in kept:
                progress[key].add(one)
        batches = self._batches()
        prefix: Prefix | None = None
        for number, (batch, needed) in enumerate(batches or [([], set())]):
            last = number >= len(batches) - 1
            chosen = [self.requests[i] for i in batch]
            prefill_seconds = 0.0
            if _is_over(deadline):
                self._gather(None)
                return
            if chosen:
                begun = time.perf_counter()
                prefix, windows = self.lm.prefill(chosen)
                self._synchronise()
                prefill_seconds = time.perf_counter() - begun
            for arm, seed in self.work.missing:
                if _is_over(deadline):
                    self._gather(None)
                    return
                mine = progress[arm.name, seed]
                if prefix is not None and (arm.name, seed) in needed:
                    use_arm(self.lm.model, arm, seed, self.lm.dense)
                    new = Progress(prefill_seconds=prefill_seconds)
                    if arm.deterministic or seed == self.header.seeds[0]:
                        read, visible = count_value_rows(self.lm.model, prefix, windows)
                        new.counters.update(rows_read=read, rows_visible=visible)
                        new.counters["rows_documents"] = sum(0 in self.owners[i][1] for i in batch)
                    self._decode(prefix, windows, batch, new)
                    mine.add(new)
                    if not last or processes().num_processes > 1:
                        self._keep(arm, seed, new)
                    bar.update(len(chosen))
                if last:
                    shares = self._gather(mine)
                    if shares is None:
                        return
                    first = processes().is_main_process
                    yield arm, seed, self._result(arm, seed, shares) if first else None
            prefix = None  # before the next batch is prefilled: a cache can be half of the memory

    def _keep(self, arm: Arm, seed: int, new: Progress) -> None:
        documents = self.work.documents
        weights = {name: self.header.provenance.get(name) for name in provenance.WEIGHT_HASHES}
        of = _belongs(documents, arm, self.header, weights)
        try:
            partial.save(self.directory, documents.task.key, arm.name, seed, of, new)
        except OSError as error:
            raise CommandError(
                f"{self.directory}: answers cannot be written: {error}; those written before are kept, "
                "and the same command goes on from there"
            ) from error

    def _decode(
        self, prefix: Prefix, windows: Sequence[Sequence[int]], batch: list[int], new: Progress
    ) -> None:
        model = self.lm.model
        chosen = [self.requests[i] for i in batch]
        santa_hf.reset_stats(model)
        begun = time.perf_counter()
        responses = self.lm.respond(prefix, windows, chosen)
        self._synchronise()
        new.seconds += time.perf_counter() - begun
        total = santa_hf.stats(model).total
        new.counters.update(sampled=total.sampled, draws=total.samples, dense=total.dense)
        new.fallbacks.update(total.fallbacks)
        for i, response in zip(batch, responses, strict=True):
            doc_id, indices = self.owners[i]
            values: list[Any]
            if isinstance(response, Decoded):
                n = len(response.token_ids)
                values = [response.text]
            else:
                n = sum(map(len, self.requests[i].continuations or ()))
                values = [(one.log_likelihood, one.is_greedy) for one in response]
            # The window's last step gives the first token of an answer, or of every continuation.
            new.tokens += len(windows[0]) + n - len(values)
            new.n_tokens[doc_id] += n
            new.answers.setdefault(doc_id, {}).update(zip(indices, values, strict=True))

    def _gather(self, mine: Progress | None) -> list[Progress] | None:
        """What all processes have of an (arm, seed); None if one of them stops instead, and then all
        do. Every process comes here once for each (arm, seed), in the same order, until it stops."""
        shares = gather_object([mine])
        self.stopped = any(share is None for share in shares)
        return None if self.stopped else shares

    def _result(self, arm: Arm, seed: int, shares: Sequence[Progress]) -> Result:
        documents = self.work.documents
        whole = Progress()
        for share in shares:
            whole.add(share)
        expected = {
            (i, n)
            for i, r in zip(documents.ids, documents.requests, strict=True)
            for n in range(len(r))
        }
        if whole.answered != expected:
            raise RuntimeError(
                f"{len(whole.answered & expected)} of {len(expected)} requests were answered"
            )
        responses = {
            doc_id: Response(
                tuple(answers[index] for index in sorted(answers)), whole.n_tokens[doc_id]
            )
            for doc_id, answers in sorted(whole.answers.items())
        }
        metrics, answered = documents.evaluate(responses)
        return Result(
            format=results.FORMAT,
            task=documents.task,
            arm=arm,
            seed=seed,
            config_hash=self.header.config_hash,
            metrics=metrics,
            documents=answered,
            counters=Counters(
                sampled=whole.counters["sampled"],
                draws=whole.counters["draws"],
                dense=whole.counters["dense"],
                fallbacks=dict(sorted(whole.fallbacks.items())),
                value_rows_read=whole.counters["rows_read"],
                value_rows_visible=whole.counters["rows_visible"],
                rows_counted_documents=whole.counters["rows_documents"],
            ),
            seconds=whole.seconds,
            prefill_seconds=whole.prefill_seconds,
            tokens=whole.tokens,
            batch_size=self.options.batch_size,
            processes=processes().num_processes,
            provenance=self.header.provenance | {"date": _now()},
        )

    def _synchronise(self) -> None:
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize()


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _limit(documents: Documents, max_length: int) -> int:
    """Most tokens of a prompt and its answer: RULER's length is allowed what it leaves out."""
    length = documents.task.length
    return max_length if length is None else max(max_length, length + _RULER_SLACK)


# Before the model is loaded


def _header(model: dict[str, Any], suite: Suite) -> Header:
    settings = suite.settings() | {"data": data.describe()}
    settings = json.loads(json.dumps(settings))
    return Header(
        format=results.FORMAT,
        model=model,
        settings=settings,
        arms=suite.made_arms(),
        seeds=list(suite.seeds),
        config_hash=results.config_hash(model, settings),
        provenance={},
    )


def _open(directory: Path, header: Header) -> tuple[Header, set[tuple[str, str, int]]]:
    """Check that a directory can be written and is new or holds this run; what of it is finished.

    Returns:
        The header, with other arms and seeds that the directory knows of, and (task, arm, seed)s.
    """
    _check_writable(directory)
    if not (directory / "run.json").exists():
        # A killed write leaves its temporary file, whose name begins with a dot.
        files = [path.name for path in directory.iterdir()] if directory.exists() else []
        if any(not name.startswith(".") for name in files):
            raise CommandError(f"{directory} exists and is not the directory of a run")
        return header, set()
    kept = results.load_header(directory)
    if kept.config_hash != header.config_hash:
        different = [
            *_differences("model", kept.model, header.model),
            *_differences("settings", kept.settings, header.settings),
        ]
        raise CommandError(
            f"{directory / 'run.json'}: the directory holds another run: {'; '.join(different[:3])}"
            f"{' ...' if len(different) > 3 else ''}; give another --out"
        )
    try:
        _, found = results.load_results(directory)
    except CommandError as error:
        raise CommandError(
            f"{error}; delete the file, and the same command makes its result again"
        ) from error
    arms = dict(kept.arms)
    for name, arm in header.arms.items():
        if arms.setdefault(name, arm) != arm:
            raise CommandError(
                f"{directory / 'run.json'}: arm {name!r} is configured otherwise there; "
                "give it another name"
            )
    header = replace(
        header,
        arms=arms,
        seeds=list(dict.fromkeys([*kept.seeds, *header.seeds])),
        provenance=kept.provenance,
    )
    return header, {(result.task.key, result.arm.name, result.seed) for result in found}


def _check_writable(directory: Path) -> None:
    """Try to write where a directory is or will be, and leave nothing."""
    there = directory
    try:
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"written")
    except OSError as error:
        raise CommandError(
            f"{directory} cannot be written: {there}: {error.strerror or error}"
        ) from error


def _differences(where: str, kept: Any, given: Any) -> list[str]:
    """The values that differ in plain data, by their paths."""
    if kept == given:
        return []
    if isinstance(kept, dict) and isinstance(given, dict):
        names = [*kept, *(name for name in given if name not in kept)]
        inner = [(f"{where}.{name}", kept.get(name), given.get(name)) for name in names]
    elif isinstance(kept, list) and isinstance(given, list) and len(kept) == len(given):
        inner = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(kept, given, strict=True))]
    else:
        return [f"{where} is {kept!r:.60} there and {given!r:.60} here"]
    return [text for path, one, other in inner for text in _differences(path, one, other)]


def _check_documents(
    works: Sequence[_Work], directory: Path, done: set[tuple[str, str, int]]
) -> None:
    """Refuse to add results on other documents than those of the results that are there."""
    tasks = {work.documents.task.key: work.documents.task for work in works}
    for key, arm, seed in done:
        path = results.result_path(directory, key, arm, seed)
        if key in tasks and results.load_result(path).task != tasks[key]:
            raise CommandError(f"{path}: its documents are not those that the data give now")


def _check_lengths(documents: Documents, tokenizer: Any, longest: int) -> None:
    """Refuse a prompt that would be truncated, as far as the tokenizer tells; the model's class counts
    again as it encodes."""
    from lm_eval.models.utils import normalize_gen_kwargs

    limit = _limit(documents, longest)
    for doc_id, requests in zip(documents.ids, documents.requests, strict=True):
        for first, second in requests:
            text, room = first, 0
            if documents.task.output_type == "generate_until":
                room = int(normalize_gen_kwargs(dict(second), _MAX_NEW_TOKENS)["max_gen_toks"])
                room = min(room, documents.max_new_tokens or room)
            else:
                text = first + second
            if len(text.encode()) + room <= limit:  # a token is a byte at least
                continue
            begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
            tokens = len(tokenizer(text, add_special_tokens=not begun).input_ids)
            if tokens + room > limit:
                raise CommandError(
                    f"{documents.task.key}, document {doc_id}: a prompt of {tokens} tokens and {room} "
                    f"more would be truncated to max_length={limit}"
                )


def _tokenizer(model: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model["name"], **_revision(model))
    except (OSError, ValueError) as error:
        raise CommandError(f"{model['name']} has no tokenizer: {error}") from error


def _check_device(device: str) -> None:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise CommandError(f"device {device!r} is none that torch knows") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs")


def _check_model(model: dict[str, Any], suite: Suite, tokenizer: Any) -> int:
    """Refuse a model, or what is to be done with it, as far as its configuration tells.

    Returns:
        Most tokens that lm-eval gives the model.
    """
    from lm_eval.models.utils import resolve_max_length
    from peft import PeftConfig

    dtype = model.get("dtype") or "auto"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CommandError(f"dtype must be auto or the name of a torch dtype, got {dtype!r}")
    if model.get("adapter"):
        try:
            PeftConfig.from_pretrained(model["adapter"])
        except (OSError, TypeError, ValueError) as error:
            raise CommandError(f"{model['adapter']} holds no adapter: {error}") from error
    try:
        changed = changed_config(model["name"], model.get("model_config"), _revision(model))
        config = changed.get("config") or AutoConfig.from_pretrained(
            model["name"], **_revision(model)
        )
    except (OSError, ValueError) as error:
        raise CommandError(f"{model['name']} is no model: {error}") from error
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for settings in suite.tasks:
        if settings.length is not None and longest is not None and settings.length > longest:
            raise CommandError(
                f"{settings.task} at {settings.length} tokens is longer than the {longest} of "
                f"{model['name']}"
            )
    for arm in suite.made_arms().values():
        try:
            check_model(arm, config)
        except ValueError as error:
            raise CommandError(f"{model['name']}: {error}") from error
    return int(resolve_max_length(config, tokenizer))


def _revision(model: dict[str, Any]) -> dict[str, Any]:
    return {"revision": model["revision"]} if model.get("revision") else {}


# The model


def _load(model: dict[str, Any], options: Options) -> Any:
    import logging

    from .lm import SantaLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    keywords = {"dtype": model.get("dtype") or "auto", **_revision(model)}
    if model.get("adapter"):
        keywords["peft"] = model["adapter"]
    return SantaLM(
        model["name"],
        attention="dense",
        device=options.device,
        batch_size=options.batch_size,
        model_config=model.get("model_config"),
        **keywords,
    )


def _model_provenance(lm: Any, weights: Mapping[str, Any], count: int) -> dict[str, Any]:
    cuda = lm.device.type == "cuda"
    return {
        "versions": provenance.versions(_PACKAGES),
        "device": torch.cuda.get_device_name() if cuda else provenance.cpu_model(),
        "processes": count,
        "threads": torch.get_num_threads(),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "dense_attention": lm.dense,
        "commit": provenance.commit(),
        "model_revision": getattr(lm.model.config, "_commit_hash", None),
        **weights,
        "date": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# The command


def _arguments(prog: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    names = ", ".join(sorted(path.stem for path in SUITES.glob("*.yaml")))
    add = parser.add_argument
    add("--model", required=True, help="path or hub id")
    add("--revision", help="of the model on the hub")
    add("--adapter", help="path or hub id of a LoRA adapter, merged before the run")
    add("--dtype", help="default: that of the checkpoint")
    add(
        "--model-config",
        metavar="JSON",
        help="changes to the model's config, made before loading; default: the model_config.json "
        "beside the adapter, if it has one",
    )
    add("--suite", required=True, help=f"a YAML file, or one of {names}")
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="instead of the suite's: the name of one of these, NAME:FILE.yaml, or "
        "NAME:KEY=VALUE,... with fields of SantaConfig or top_k=K; dense always runs",
    )
    add("--seeds", type=int, nargs="+", help="keys of the draws, instead of the suite's")
    add("--limit", type=int, help="documents of each task")
    add(
        "--window",
        type=int,
        help="prompt tokens that go through the decode path, instead of the suite's and its tasks'",
    )
    add(
        "--out",
        type=Path,
        required=True,
        help="directory of the run; one that exists is gone on with",
    )
    add(
        "--device",
        default=device_name(None),
        help="default: %(default)s",
    )
    add(
        "--batch-size",
        type=int,
        help=f"documents, default: {Options.batch_size}, on a GPU {_GPU_BATCH}",
    )
    add(
        "--batch-tokens",
        type=int,
        default=Options.batch_tokens,
        help="cached tokens in a batch, default: %(default)s",
    )
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no further batch of an arm after it",
    )
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval run`."""
    arguments = _arguments(prog, argv)
    if arguments.batch_size is None:
        arguments.batch_size = (
            _GPU_BATCH if arguments.device.startswith("cuda") else Options.batch_size
        )
    for name in ("batch_size", "batch_tokens"):
        if getattr(arguments, name) < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1")
    overrides: dict[str, Any] = {}
    if arguments.seeds is not None:
        overrides["seeds"] = tuple(arguments.seeds)
    suite = Suite.from_yaml(
        find_suite(arguments.suite),
        limit=arguments.limit,
        window=arguments.window,
        arms=arguments.arms,
        **overrides,
    )
    model = {
        "name": arguments.model,
        "revision": arguments.revision,
        "adapter": arguments.adapter,
        "dtype": arguments.dtype,
        "model_config": (
            adapters_config(arguments.adapter)
            if arguments.model_config is None
            else _json(arguments.model_config)
        ),
    }
    options = Options(
        device=arguments.device,
        batch_size=arguments.batch_size,
        batch_tokens=arguments.batch_tokens,
        time_limit=arguments.time_limit,
        progress=not arguments.quiet,
    )
    found = run(model, suite, arguments.out, options)
    if found:
        print(_summary(results.load_header(arguments.out), found))


def _summary(header: Header, found: Sequence[Result]) -> str:
    """What `compare` says of a run, as far as it is; scores alone where there is nothing to compare."""
    try:
        rows = compare(header, found)
    except CommandError as error:  # an unfinished run may lack dense
        rows, reason = [], f"nothing to compare: {error}"
    else:
        reason = "nothing to compare dense with"
    if rows:
        return table(rows, remarks=remarks(header, found, unfinished(header, found)))
    scores = [
        f"{result.task.key}  {result.arm.name}  seed {result.seed}  {result.score.value:.4f}"
        for result in found
    ]
    return "\n".join([*scores, reason])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"--model-config is not JSON: {error}") from error
