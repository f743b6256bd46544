"""Result files: what a run leaves behind, and all that `compare` and `report` read.

A run is a directory:

    run.json                            what was asked for: a `Header`
    <task key>/<arm name>/seed-<n>.json one finished (task, arm, seed): a `Result`

The key of a task is its name, with "-<length>" appended for a task that has a context length
("niah_single_1-32768"). An arm that draws nothing (`Arm.deterministic`: dense, top-k) runs once, and its
only file is seed-0.json, whatever seeds the others have. A file appears complete or not at all, so a
killed run, or a full disk, leaves the finished results as they were.

Everything is JSON without NaN; a statistic that does not exist (the standard error of one document)
is null. The fields are those of the dataclasses below, all of them present (but for those with a
default, which older files lack), none besides.

`Header.config_hash` is the hash of model and settings, all that makes documents and dense answers what
they are; every result carries it. Arms and seeds are not part of it: a run can be given more of both
later. An arm's name stands for one configuration within a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cli import CommandError
from .provenance import WEIGHT_HASHES

__all__ = [
    "WEIGHTS",
    "Arm",
    "Counters",
    "Document",
    "Header",
    "Metric",
    "Result",
    "Task",
    "check_weights",
    "config_hash",
    "expected_tasks",
    "load_header",
    "load_result",
    "load_results",
    "read_json",
    "result_path",
    "save_header",
    "save_result",
    "write_json",
    "write_text",
    "writing",
]

FORMAT = 1
# What of a result's provenance says which weights answered.
WEIGHTS = (*WEIGHT_HASHES, "model_revision")


@dataclass(frozen=True)
class Task:
    """A task as lm-eval defines it, at one context length.

    Attributes:
        name: lm-eval's name.
        version: lm-eval's version of the task.
        length: context length in tokens for tasks built to one (RULER), else None.
        group: lm-eval's group that the task's score belongs to ("ruler", "mmlu"), or None.
        output_type: lm-eval's: "generate_until" or "multiple_choice".
        num_fewshot: examples in the prompt.
        documents_sha256: hash of all prompts and targets, in order.
        main_metric: name of the metric to compare arms by.
        higher_is_better: for every metric.
        chance: what guessing scores on the main metric; 0 for generated answers.
    """

    name: str
    version: float
    length: int | None
    group: str | None
    output_type: str
    num_fewshot: int
    documents_sha256: str
    main_metric: str
    higher_is_better: dict[str, bool]
    chance: float

    @property
    def key(self) -> str:
        """Name of the task's directory in the run."""
        return self.name if self.length is None else f"{self.name}-{self.length}"


@dataclass(frozen=True)
class Arm:
    """A way to decode.

    Attributes:
        name: as given by the suite or the command line; letters, digits and "._-".
        method: "dense" (the model's own SDPA), "santa", or "top-k" (the foil: softmax over the `k`
            largest scores alone).
        config: every field of SantaConfig for "santa", whose seed is replaced by the result's seed;
            {"k": int} for "top-k"; None for "dense".
        deterministic: the arm draws nothing, so it runs once, as seed 0.
    """

    name: str
    method: str
    config: dict[str, Any] | None
    deterministic: bool


@dataclass(frozen=True)
class Document:
    """What one arm made of one document.

    Attributes:
        doc_id: lm-eval's index of the document in the task; pairs documents over arms and seeds.
        doc_hash: hash of prompt and target: equal ids of one run have equal hashes.
        scores: the document's score by metric.
        output: the generated answer, or the text of the choice that scored best.
        n_tokens: tokens generated, or tokens of all choices scored.
    """

    doc_id: int
    doc_hash: str
    scores: dict[str, float]
    output: str
    n_tokens: int


@dataclass(frozen=True)
class Metric:
    """A metric over the documents: its mean and the mean's standard error (None for one document)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Counters:
    """What the attention layers did in the decode steps of this arm, from `santa_hf.stats`.

    Attributes:
        sampled: calls that drew samples, summed over layers.
        draws: draws, summed over calls, rows and query heads.
        dense: calls that were exact as configured.
        fallbacks: calls that went dense because they could not be sampled, by reason.
        value_rows_read, value_rows_visible: distinct value rows read and rows visible, summed over the
            prompts of `rows_counted_documents` documents, layers and KV heads, counted at one decode
            step each (the last prompt token); 0 where nothing was counted: for one seed alone. For
            dense and top-k as for santa.
        rows_counted_documents: documents over which rows were counted; in older files, few.
    """

    sampled: int
    draws: int
    dense: int
    fallbacks: dict[str, int]
    value_rows_read: int
    value_rows_visible: int
    rows_counted_documents: int

    @property
    def share_of_rows_read(self) -> float | None:
        """Distinct value rows read over rows visible; None if none were counted."""
        return self.value_rows_read / self.value_rows_visible if self.value_rows_visible else None


@dataclass(frozen=True)
class Result:
    """One finished (task, arm, seed).

    Attributes:
        format: version of this format, 1.
        task, arm: what ran.
        seed: key of the draws; 0 for a deterministic arm.
        config_hash: `Header.config_hash` of the run.
        metrics: by name.
        documents: in order of doc_id, each once.
        counters: what the attention layers did.
        seconds: wall time of the decode steps, prefill left out, summed over processes.
        prefill_seconds: wall time of the prefills, which all arms and seeds of the task share.
        tokens: tokens that went through a decode step: the decode window's and the answers'.
        batch_size: documents decoded together at most.
        processes: processes that shared the documents.
        provenance: versions, device, commit, model revision, date, as in the header.
    """

    format: int
    task: Task
    arm: Arm
    seed: int
    config_hash: str
    metrics: dict[str, Metric]
    documents: list[Document]
    counters: Counters
    seconds: float
    prefill_seconds: float
    tokens: int
    batch_size: int
    processes: int
    provenance: dict[str, Any]

    @property
    def score(self) -> Metric:
        """The main metric."""
        return self.metrics[self.task.main_metric]


@dataclass(frozen=True)
class Header:
    """run.json.

    Attributes:
        format: version of this format, 1.
        model: what was loaded: "name" (path or hub id), "revision", "adapter", "dtype".
        settings: the suite: tasks with lengths and limits, decode window, few-shot examples, chat
            template, seed of the data.
        arms: by name, in order; "dense" first.
        seeds: keys of the draws.
        config_hash: `config_hash(model, settings)`.
        provenance: "versions" of packages, "device", "commit", "model_sha256", "date".
        tasks: keys of all tasks that the settings come to, the groups' one by one; empty in older
            files, see `expected_tasks`.
    """

    format: int
    model: dict[str, Any]
    settings: dict[str, Any]
    arms: dict[str, Arm]
    seeds: list[int]
    config_hash: str
    provenance: dict[str, Any]
    tasks: list[str] = field(default_factory=list)


def config_hash(model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Hash of what a run evaluates; equal whatever the arms, seeds, batch size and machine."""
    text = json.dumps([model, settings], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_path(run: str | os.PathLike[str], task_key: str, arm: str, seed: int) -> Path:
    """Where a run keeps the result of (task, arm, seed)."""
    return Path(run) / task_key / arm / f"seed-{seed}.json"


def save_header(run: str | os.PathLike[str], header: Header) -> None:
    """Write run.json."""
    write_json(Path(run) / "run.json", dataclasses.asdict(header))


def save_result(run: str | os.PathLike[str], result: Result) -> Path:
    """Write a result where `result_path` says; refuses what `load_result` would refuse."""
    path = result_path(run, result.task.key, result.arm.name, result.seed)
    values = dataclasses.asdict(result)
    _check_result(_read(Result, values, str(path)), path)
    write_json(path, values)
    return path


def load_header(run: str | os.PathLike[str]) -> Header:
    """Read run.json.

    Raises:
        CommandError: no such run, or a file that is not one; the message names the file.
    """
    path = Path(run) / "run.json"
    header = read_json(Header, path)
    if header.config_hash != config_hash(header.model, header.settings):
        raise CommandError(f"{path}: config_hash is not that of its model and settings")
    for name, arm in header.arms.items():
        _check_arm(arm, str(path))
        if name != arm.name:
            raise CommandError(f"{path}: arm {name!r} calls itself {arm.name!r}")
    for key in header.tasks:
        if not re.fullmatch(r"[^/]+", key) or header.tasks.count(key) > 1:
            raise CommandError(f"{path}: tasks must be keys of tasks, each once, got {key!r}")
    return header


def expected_tasks(header: Header, found: Iterable[Result]) -> tuple[list[str], list[str]]:
    """The tasks that a run is to finish, and the groups of which it is not known what they hold.

    Args:
        header: of the run. One without `tasks` is an older one, whose settings name tasks, or groups
            without saying what is in them.
        found: results, which tell a group's name from a task's.

    Returns:
        Keys of tasks, in the run's order, and names of groups.
    """
    keys = dict.fromkeys(header.tasks)
    groups = []
    if not keys:
        known = {(result.task.group, result.task.length) for result in found}
        for settings in header.settings.get("tasks", []):
            name, length = settings["task"], settings.get("length")
            if (name, length) in known:
                groups.append(name if length is None else f"{name}-{length}")
            else:
                keys[name if length is None else f"{name}-{length}"] = None
    return list(keys | dict.fromkeys(sorted({result.task.key for result in found}))), groups


def load_result(path: str | os.PathLike[str], header: Header | None = None) -> Result:
    """Read one result, and check it against the run it belongs to.

    Raises:
        CommandError: not a result, or one of another run; the message names the file and what is
            wrong.
    """
    path = Path(path)
    result = read_json(Result, path)
    _check_result(result, path)
    if header is not None:
        if result.config_hash != header.config_hash:
            raise CommandError(
                f"{path}: a result of another configuration ({result.config_hash}); "
                f"this run's is {header.config_hash}"
            )
        if header.tasks and result.task.key not in header.tasks:
            raise CommandError(f"{path}: task {result.task.key!r} is none of those in run.json")
        if header.arms.get(result.arm.name) != result.arm:
            raise CommandError(f"{path}: arm {result.arm.name!r} is not configured as in run.json")
    return result


def load_results(run: str | os.PathLike[str]) -> tuple[Header, list[Result]]:
    """A run's header and its finished results, by task, then arms in the header's order, then seed.

    Raises:
        CommandError: a file is corrupt or of another run, two results of a task disagree about the
            documents, or two results about the weights.
    """
    header = load_header(run)
    order = {name: i for i, name in enumerate(header.arms)}
    results = [load_result(path, header) for path in sorted(_result_files(Path(run)))]
    results.sort(key=lambda r: (r.task.key, order[r.arm.name], r.seed))
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(result.task.key, result)
        if other.task != result.task or _identity(other) != _identity(result):
            paths = [result_path(run, r.task.key, r.arm.name, r.seed) for r in (result, other)]
            raise CommandError(f"{paths[0]}: its documents are not those of {paths[1]}")
        for name in WEIGHTS:
            if result.provenance.get(name) != results[0].provenance.get(name):
                paths = [
                    result_path(run, r.task.key, r.arm.name, r.seed) for r in (result, results[0])
                ]
                raise CommandError(
                    f"{paths[0]}: {name} is {result.provenance.get(name)}, that of {paths[1]} is "
                    f"{results[0].provenance.get(name)}: the weights changed between them"
                )
    return header, results


def check_weights(run: str | os.PathLike[str], header: Header, weights: Mapping[str, Any]) -> None:
    """Refuse to add to a run what other weights give than those that gave what is there.

    Raises:
        CommandError: one of `weights` is not what run.json says; the message names it.
    """
    for name, value in weights.items():
        kept = header.provenance.get(name, value)
        if kept != value:
            raise CommandError(
                f"{Path(run) / 'run.json'}: {name} is {kept} there and {value} here: the weights have "
                "changed; give another --out"
            )


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file so that it appears complete or not at all.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while files are written into a CommandError that names the path."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error


def _result_files(run: Path) -> Iterator[Path]:
    return run.glob("*/*/seed-*.json")


def _identity(result: Result) -> list[tuple[int, str]]:
    return [(document.doc_id, document.doc_hash) for document in result.documents]


def _check_result(result: Result, path: Path) -> None:
    where = str(path)
    if result.format != FORMAT:
        raise CommandError(f"{where}: format {result.format}; this version reads {FORMAT}")
    _check_arm(result.arm, where)
    stated = result_path(path.parent.parent.parent, result.task.key, result.arm.name, result.seed)
    if stated != path:
        raise CommandError(f"{where}: holds the result that belongs in {stated}")
    if result.arm.deterministic and result.seed != 0:
        raise CommandError(f"{where}: arm {result.arm.name!r} draws nothing and has seed 0 alone")
    ids = [document.doc_id for document in result.documents]
    if not ids or ids != sorted(set(ids)):
        raise CommandError(f"{where}: documents must be at least one, in order, each once")
    names = set(result.metrics)
    if result.task.main_metric not in names or names != set(result.task.higher_is_better):
        raise CommandError(f"{where}: metrics are {sorted(names)}, the task's are others")
    for document in result.documents:
        if not names >= {result.task.main_metric} <= set(document.scores):
            raise CommandError(
                f"{where}: document {document.doc_id} has no score {result.task.main_metric!r}"
            )


def _check_arm(arm: Arm, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arm.name):
        raise CommandError(f"{where}: {arm.name!r} is no name of an arm (letters, digits, ._-)")
    if arm.method not in ("dense", "santa", "top-k"):
        raise CommandError(f"{where}: method must be dense, santa or top-k, got {arm.method!r}")


def read_json(kind: type, path: Path) -> Any:
    """A JSON file as an instance of a dataclass: all its fields, none besides.

    Raises:
        CommandError: no such file, corrupt, or not of that kind; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CommandError(f"{path}: corrupt: {error}") from error
    return _read(kind, values, str(path))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value`, plain data, as an instance of the type `kind`; a CommandError says where it is not."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise CommandError(f"{where}: expected an object, got {value!r:.60}")
        hints = typing.get_type_hints(kind)
        needed = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is f.default_factory is dataclasses.MISSING
        ]
        for name in [*(n for n in needed if n not in value), *(n for n in value if n not in hints)]:
            problem = "is missing" if name in hints else "is not a field"
            raise CommandError(f"{where}: {name!r} {problem}")
        read = {n: _read(hints[n], item, f"{where}: {n}") for n, item in value.items()}
        return kind(**read)  # type: ignore[operator]
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _read(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: _read(arguments[1], item, f"{where}[{k!r}]") for k, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = kind.__name__ if origin is None else str(kind)
    raise CommandError(f"{where}: expected {name}, got {value!r:.60}")
