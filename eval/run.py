"""Run the arms of a suite on the same documents: one result file for each (task, arm, seed).

Every prompt is prefilled once, densely, and every arm and seed decodes from that cache. A result is
written as soon as its last document is answered; started again, a run goes on with what is not there.

Started by `accelerate launch`, processes share the documents of every task and the first one writes.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import santa_hf

from . import data, provenance, results
from .arms import check_device, use_arm
from .cli import CommandError
from .decode import Decoded, Prefix, count_value_rows
from .models import adapters_config, changed_config
from .processes import device_name, processes
from .results import Arm, Counters, Header, Result
from .suite import SUITES, Suite, find_suite
from .tasks import Documents, Response, load_documents

if TYPE_CHECKING:
    from .lm import Request

__all__ = ["Options", "main", "run"]

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


@dataclass(frozen=True)
class Options:
    """How to run, which changes no result beyond rounding.

    Attributes:
        device: "cuda", "cpu", ...
        batch_size: documents decoded together at most.
        batch_tokens: cached tokens in a batch at most; one document may exceed it.
        count_documents: documents of each (task, arm) over which value rows are counted.
        time_limit: seconds after which no further (task, arm, seed) is begun; None for no limit.
        progress: show a progress bar.
    """

    device: str = "cpu"
    batch_size: int = 16
    batch_tokens: int = 131072
    count_documents: int = 4
    time_limit: float | None = None
    progress: bool = True


@dataclass
class _Progress:
    """What one process has of a (task, arm, seed).

    Attributes:
        answers: for each document, what it got by the index of its request in lm-eval's order.
        n_tokens: for each document, tokens generated or scored.
    """

    answers: dict[int, dict[int, Any]] = field(default_factory=dict)
    n_tokens: Counter[int] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    tokens: int = 0


@dataclass
class _Work:
    """What is left to do of a task."""

    documents: Documents
    missing: list[tuple[Arm, int]]


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
    done = _open(directory, header)
    # Before the first process writes there, the others have looked.
    state.wait_for_everyone()
    tokenizer = _tokenizer(model)
    _check_model(model, suite)
    works = []
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
            _check_documents(documents, directory, done)
            if missing:
                works.append(_Work(documents, missing))
    if works:
        _run_all(model, suite, directory, options, header, works, started)
    state.wait_for_everyone()
    return results.load_results(directory)[1] if state.is_main_process else []


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
    lm = _load(model, suite, options)
    header = replace(
        header, provenance=header.provenance | _model_provenance(lm, model, state.num_processes)
    )
    if state.is_main_process:
        results.save_header(directory, header)
    runners = [_TaskRunner(lm, work, options, header) for work in works]
    total = sum(len(runner.requests) * len(runner.work.missing) for runner in runners)
    bar = tqdm(
        total=total,
        unit="prompt",
        disable=not options.progress or not state.is_main_process,
        smoothing=0.1,
    )
    deadline = None if options.time_limit is None else started + options.time_limit
    with bar:
        for runner in runners:
            bar.set_postfix_str(runner.work.documents.task.key)
            for result in runner.results(bar, deadline):
                if state.is_main_process:
                    _save(directory, result)
            if runner.stopped:
                if state.is_main_process:
                    bar.write(f"stopped by the time limit of {options.time_limit:g} s")
                break


def _save(directory: Path, result: Result) -> None:
    try:
        results.save_result(directory, result)
    except OSError as error:
        raise CommandError(
            f"{directory}: a result cannot be written: {error}; those finished before are kept, and the "
            "same command goes on from there"
        ) from error


class _TaskRunner:
    """Runs the arms of one task on this process's share of its documents."""

    def __init__(self, lm: Any, work: _Work, options: Options, header: Header) -> None:
        state = processes()
        self.lm, self.work, self.options, self.header = lm, work, options, header
        self.stopped = False
        documents = work.documents
        length = documents.task.length
        limit = lm.max_length if length is None else max(lm.max_length, length + _RULER_SLACK)
        # Shared by the rank over all machines, one document each in turn.
        mine = range(state.process_index, len(documents), state.num_processes)
        # Of each request, its document and which of lm-eval's requests of that document it answers.
        self.requests: list[Request] = []
        self.owners: list[tuple[int, Sequence[int]]] = []
        for i in mine:
            arguments = documents.requests[i]
            if documents.task.output_type == "generate_until":
                new = [(lm.generation(*arguments[0], documents.max_new_tokens, limit), [0])]
            else:
                new = lm.choices(arguments, limit)
            self.requests += [request for request, _ in new]
            self.owners += [(documents.ids[i], indices) for _, indices in new]

    def results(self, bar: Any, deadline: float | None) -> Iterator[Result]:
        """Results in the order in which they are finished, whole in the first process."""
        progress = {(arm.name, seed): _Progress() for arm, seed in self.work.missing}
        state = processes()
        options = self.options
        prefill_seconds = 0.0
        batches = self.lm.batched(self.requests, options.batch_size, options.batch_tokens)
        counted = 0
        prefix: Prefix | None = None
        for number, batch in enumerate(batches or [[]]):
            last = number >= len(batches) - 1
            chosen = [self.requests[i] for i in batch]
            if self._out_of_time(deadline, collective=number == 0):
                return
            if chosen:
                begun = time.perf_counter()
                prefix, windows = self.lm.prefill(chosen)
                self._synchronise()
                prefill_seconds += time.perf_counter() - begun
                counting = min(max(options.count_documents - counted, 0), len(chosen))
            for arm, seed in self.work.missing:
                if self._out_of_time(deadline, collective=last):
                    return
                mine = progress[arm.name, seed]
                if prefix is not None:
                    use_arm(self.lm.model, arm, seed, self.lm.dense)
                    if counting and seed == self._first_seed(arm):
                        _count_rows(
                            self.lm.model, arm, prefix.first(counting), windows[:counting], mine
                        )
                    self._decode(prefix, windows, batch, mine)
                    bar.update(len(chosen) * state.num_processes)
                if last:
                    result = self._gather(arm, seed, mine, prefill_seconds)
                    if result is not None:
                        yield result
            counted += len(chosen)
            prefix = None  # before the next batch is prefilled: a cache can be half of the memory

    def _first_seed(self, arm: Arm) -> int:
        return next(seed for other, seed in self.work.missing if other == arm)

    def _decode(
        self, prefix: Prefix, windows: Sequence[Sequence[int]], batch: list[int], mine: _Progress
    ) -> None:
        model = self.lm.model
        chosen = [self.requests[i] for i in batch]
        santa_hf.reset_stats(model)
        begun = time.perf_counter()
        responses = self.lm.respond(prefix, windows, chosen)
        self._synchronise()
        mine.seconds += time.perf_counter() - begun
        total = santa_hf.stats(model).total
        mine.counters.update(sampled=total.sampled, draws=total.samples, dense=total.dense)
        mine.fallbacks.update(total.fallbacks)
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
            mine.tokens += len(windows[0]) + n - len(values)
            mine.n_tokens[doc_id] += n
            mine.answers.setdefault(doc_id, {}).update(zip(indices, values, strict=True))

    def _gather(
        self, arm: Arm, seed: int, mine: _Progress, prefill_seconds: float
    ) -> Result | None:
        """The result of all processes, in the first one; None in others."""
        state = processes()
        shares = gather_object([(mine, prefill_seconds)])
        if not state.is_main_process:
            return None
        documents = self.work.documents
        responses: dict[int, Response] = {}
        counters: Counter[str] = Counter()
        fallbacks: Counter[str] = Counter()
        for share, _ in shares:
            twice = responses.keys() & share.answers.keys()
            if twice:
                raise RuntimeError(f"documents {sorted(twice)} were answered by two processes")
            for doc_id, answers in share.answers.items():
                values = tuple(answers[index] for index in sorted(answers))
                responses[doc_id] = Response(values, share.n_tokens[doc_id])
            counters.update(share.counters)
            fallbacks.update(share.fallbacks)
        if sorted(responses) != documents.ids:
            raise RuntimeError(f"{len(responses)} of {len(documents)} documents were answered")
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
                sampled=counters["sampled"],
                draws=counters["draws"],
                dense=counters["dense"],
                fallbacks=dict(sorted(fallbacks.items())),
                value_rows_read=counters["rows_read"],
                value_rows_visible=counters["rows_visible"],
                rows_counted_documents=counters["rows_documents"],
            ),
            seconds=sum(share.seconds for share, _ in shares),
            prefill_seconds=sum(seconds for _, seconds in shares),
            tokens=sum(share.tokens for share, _ in shares),
            batch_size=self.options.batch_size,
            processes=state.num_processes,
            provenance=self.header.provenance | {"date": _now()},
        )

    def _out_of_time(self, deadline: float | None, collective: bool) -> bool:
        """Whether to stop. Processes have to agree where they are about to meet; where only some
        of them may be, the others' clocks are not asked."""
        if deadline is None or self.stopped:
            return self.stopped
        state = processes()
        if state.num_processes == 1:
            self.stopped = time.monotonic() > deadline
        elif collective:
            self.stopped = any(gather_object([time.monotonic() > deadline]))
        return self.stopped

    def _synchronise(self) -> None:
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize()


def _count_rows(
    model: Any, arm: Arm, prefix: Prefix, windows: Sequence[Sequence[int]], mine: _Progress
) -> None:
    """Count the value rows that one decode step reads, in a pass of its own."""
    visible = count_value_rows(model, prefix, windows)
    total = santa_hf.stats(model).total
    # What is exact by its configuration, or its model's attention, reads what it sees.
    read = total.rows_read + visible - total.rows_visible if arm.method == "santa" else visible
    if arm.method == "top-k":
        read = total.rows_read
    mine.counters.update(rows_read=read, rows_visible=visible, rows_documents=len(windows))


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


def _open(directory: Path, header: Header) -> set[tuple[str, str, int]]:
    """Check that a directory is new or holds this run, and say what of it is finished.

    What it knows of other arms and seeds is added to `header`.
    """
    if not (directory / "run.json").exists():
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CommandError(f"{directory} exists and is not the directory of a run")
        return set()
    kept, found = results.load_results(directory)
    if kept.config_hash != header.config_hash:
        different = [
            name for name in ("model", "settings") if getattr(kept, name) != getattr(header, name)
        ]
        raise CommandError(
            f"{directory / 'run.json'}: the directory holds a run of another {' and '.join(different)}; "
            "give another --out"
        )
    for name, arm in kept.arms.items():
        if header.arms.setdefault(name, arm) != arm:
            raise CommandError(
                f"{directory / 'run.json'}: arm {name!r} is configured otherwise there; "
                "give it another name"
            )
    header.seeds[:] = list(dict.fromkeys([*kept.seeds, *header.seeds]))
    return {(result.task.key, result.arm.name, result.seed) for result in found}


def _check_documents(
    documents: Documents, directory: Path, done: set[tuple[str, str, int]]
) -> None:
    """Refuse to add results on other documents than those of the results that are there."""
    for key, arm, seed in done:
        if key == documents.task.key:
            path = results.result_path(directory, key, arm, seed)
            if results.load_result(path).task != documents.task:
                raise CommandError(f"{path}: its documents are not those that the data give now")


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


def _check_model(model: dict[str, Any], suite: Suite) -> None:
    """Refuse a model, or what is to be done with it, as far as its configuration tells."""
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


def _revision(model: dict[str, Any]) -> dict[str, Any]:
    return {"revision": model["revision"]} if model.get("revision") else {}


# The model


def _load(model: dict[str, Any], suite: Suite, options: Options) -> Any:
    import logging

    from .lm import SantaLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    keywords = {"dtype": model.get("dtype") or "auto", **_revision(model)}
    if model.get("adapter"):
        keywords["peft"] = model["adapter"]
    return SantaLM(
        model["name"],
        window=suite.window,
        attention="dense",
        device=options.device,
        batch_size=options.batch_size,
        model_config=model.get("model_config"),
        **keywords,
    )


def _model_provenance(lm: Any, model: dict[str, Any], count: int) -> dict[str, Any]:
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
        "model_sha256": _weights_hash(Path(model["name"])),
        "adapter_sha256": _weights_hash(Path(model["adapter"])) if model.get("adapter") else None,
        "date": _now(),
    }


def _weights_hash(directory: Path) -> str | None:
    """Hash of the weights in a local directory; None for a name on the hub."""
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest() if files else None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# The command


def table(found: Sequence[Result]) -> str:
    """Results and group scores as text, one line for each (task, arm): means over seeds."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in found:
        rows.setdefault((result.task.key, result.arm.name), []).append(result)
    lines = [f"{'task':28} {'arm':20} {'seeds':>5} {'documents':>9}  score          value rows"]
    for (task, arm), group in rows.items():
        mean = sum(result.score.value for result in group) / len(group)
        error = group[0].score.stderr
        share = group[0].counters.share_of_rows_read
        lines.append(
            f"{task:28} {arm:20} {len(group):5} {len(group[0].documents):9}  {mean:.4f}"
            f"{'' if error is None else f' ± {error:.4f}':9}"
            f"{'' if share is None else f'{share:.2%}':>11}"
        )
    for score in results.group_scores(found):
        lines.append(
            f"{score.key:28} {score.arm:20} {len(score.seeds):5} {score.documents:9}  "
            f"{score.value:.4f}{'' if score.stderr is None else f' ± {score.stderr:.4f}'}"
        )
    return "\n".join(lines)


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
    add("--window", type=int, help="prompt tokens that go through the decode path")
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
    add("--time-limit", type=float, metavar="SECONDS", help="begin nothing after it")
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
    if arguments.window is not None:
        overrides["window"] = arguments.window
    suite = Suite.from_yaml(
        find_suite(arguments.suite), limit=arguments.limit, arms=arguments.arms, **overrides
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
        print(table(found))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"--model-config is not JSON: {error}") from error
