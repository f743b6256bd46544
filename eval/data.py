"""Local copies of the data sets that lm-eval's tasks read.

By default lm-eval fetches them from the hub. SANTA_HF_DATA names a directory that holds copies, which
are then read instead; prompts, metrics and versions of the tasks stay lm-eval's own:

    gsm8k/main/{train,test}.parquet              openai/gsm8k
    mmlu/{dev,test}/<subject>.parquet            cais/mmlu
    ruler/squad_dev_v2.0.json[.gz]               SQuAD 2.0 dev, for ruler_qa_squad
    ruler/hotpot_dev_distractor*.json[.gz]       HotpotQA dev, for ruler_qa_hotpot
    ruler/paul_graham_essays/train.parquet       baber/paul_graham_essays, RULER's haystack of prose, or
    ruler/public_domain_essays/train.parquet     any other prose (column "text") in its place
    ruler/nltk_data/tokenizers/punkt_tab/        nltk's sentence splitter, for the same tasks
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .cli import CommandError

__all__ = ["VARIABLE", "data_directory", "describe", "local_data"]

VARIABLE = "SANTA_HF_DATA"

_ESSAYS = ("paul_graham_essays", "public_domain_essays")
# What lm-eval calls a data set, and its directory here.
_DATA_SETS = {
    "openai/gsm8k": "gsm8k",
    "gsm8k": "gsm8k",
    "cais/mmlu": "mmlu",
    "hails/mmlu_no_train": "mmlu",
    "baber/paul_graham_essays": "ruler",
}
# The columns that lm-eval reads of them.
_COLUMNS = {
    "gsm8k": ("question", "answer"),
    "mmlu": ("question", "choices", "answer"),
    "ruler": ("text",),
}
# The end of the address that lm-eval fetches, and the pattern of the file here.
_FILES = {
    "dev-v2.0.json": "squad_dev_v2.0.json*",
    "hotpot_dev_distractor_v1.json": "hotpot_dev_distractor*.json*",
}


def data_directory() -> Path | None:
    """The directory that SANTA_HF_DATA names; None if it is not set.

    Raises:
        CommandError: there is no such directory.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    directory = Path(name)
    if not directory.is_dir():
        raise CommandError(f"{VARIABLE}={name} is not a directory")
    return directory


def describe() -> dict[str, str]:
    """Where data come from, for the settings of a run: they decide on the documents."""
    directory = data_directory()
    if directory is None:
        return {"source": "hub"}
    essays = [name for name in _ESSAYS if (directory / "ruler" / name).is_dir()]
    return {"source": "local", "haystack": essays[0] if essays else "none"}


def ruler_files(source: str) -> list[Path]:
    """The files that hold a source of RULER's tasks in the local directory.

    Args:
        source: "essays", "squad" or "hotpot".

    Raises:
        CommandError: one is missing.
    """
    directory = data_directory()
    if directory is None:
        return []
    if source == "essays":
        punkt = directory / "ruler/nltk_data/tokenizers/punkt_tab"
        # All languages are there; the generators split English.
        return [_essays(directory), *sorted((punkt / "english").glob("*"))]
    return [_file(directory, next(p for p in _FILES.values() if p.startswith(source)))]


@contextmanager
def local_data() -> Iterator[None]:
    """While active, data sets that lm-eval asks for are read from the local directory, if one is set.

    Raises:
        CommandError: inside, where a file is not there or cannot be read; the message names it.
    """
    directory = data_directory()
    if directory is None:
        yield
        return
    import datasets
    import nltk
    import requests

    load_dataset, get = datasets.load_dataset, requests.get

    def load_local(
        path: str, name: str | None = None, split: str | None = None, **kwargs: Any
    ) -> Any:
        if path not in _DATA_SETS:
            return load_dataset(path, name, split=split, **kwargs)
        found = _data_set(directory, path, name)
        return found if split is None else found[split]

    def get_local(url: str, *args: Any, **kwargs: Any) -> Any:
        pattern = next((p for end, p in _FILES.items() if url.endswith(end)), None)
        return get(url, *args, **kwargs) if pattern is None else _LocalFile(directory, pattern)

    with ExitStack() as stack:
        stack.enter_context(patch.object(datasets, "load_dataset", load_local))
        stack.enter_context(patch.object(requests, "get", get_local))
        stack.enter_context(
            patch.object(nltk.data, "path", [str(directory / "ruler/nltk_data"), *nltk.data.path])
        )
        yield


def _data_set(directory: Path, path: str, name: str | None) -> dict[str, Any]:
    """The splits of a data set that have a file here."""
    folder = directory / _DATA_SETS[path]
    columns = _COLUMNS[_DATA_SETS[path]]
    if path == "baber/paul_graham_essays":
        return {"train": _table(_essays(directory), columns)}
    if _DATA_SETS[path] == "gsm8k":
        files = {split: folder / "main" / f"{split}.parquet" for split in ("train", "test")}
    else:
        files = {split: folder / split / f"{name}.parquet" for split in ("dev", "test")}
    return {split: _table(file, columns) for split, file in files.items()}


def _essays(directory: Path) -> Path:
    files = [directory / "ruler" / essays / "train.parquet" for essays in _ESSAYS]
    return _present(next((file for file in files if file.is_file()), files[0]))


def _file(directory: Path, pattern: str) -> Path:
    files = sorted((directory / "ruler").glob(pattern))
    return _present(files[0] if files else directory / "ruler" / pattern)


def _present(file: Path) -> Path:
    if not file.is_file():
        raise CommandError(f"{file} is missing, in the directory that {VARIABLE} names")
    return file


def _table(file: Path, columns: tuple[str, ...]) -> Any:
    import datasets
    import pyarrow
    import pyarrow.parquet

    _present(file)
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise CommandError(f"{file} is not a parquet file: {error}") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise CommandError(
            f"{file} has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
        )
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _check_squad(values: Any) -> None:
    """Read all that lm-eval reads of SQuAD's file."""
    for paragraph in [p for article in values["data"] for p in article["paragraphs"]]:
        _text(paragraph["context"])
        for question in paragraph["qas"]:
            if not question["is_impossible"]:
                _text(question["question"])
                for answer in question["answers"]:
                    _text(answer["text"])


def _check_hotpot(values: Any) -> None:
    """Read all that lm-eval reads of HotpotQA's file."""
    for question in values:
        _text(question["question"])
        _text(question["answer"])
        for title, sentences in question["context"]:
            _text(title)
            "".join(sentences)


def _text(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.60}")


class _LocalFile:
    """What lm-eval uses of a response of `requests.get`."""

    def __init__(self, directory: Path, pattern: str) -> None:
        self._file = _file(directory, pattern)
        self._check = _check_squad if pattern.startswith("squad") else _check_hotpot

    def raise_for_status(self) -> None:
        """The file is there."""

    def json(self) -> Any:
        """Its contents."""
        try:
            data = self._file.read_bytes()
            values = json.loads(gzip.decompress(data) if self._file.suffix == ".gz" else data)
        except (OSError, EOFError, ValueError) as error:
            raise CommandError(f"{self._file} cannot be read: {error}") from error
        try:
            self._check(values)
        except (LookupError, TypeError, ValueError) as error:
            raise CommandError(
                f"{self._file} is not in the format that lm-eval reads: {type(error).__name__}: {error}"
            ) from error
        return values
