"""RULER's documents: built once per (task, length, tokenizer, seed), hashed and kept.

lm-eval makes them with its own generators, 500 of each task, from the global random state, so that they
would depend on what ran before. Here that state is seeded by (seed, task, length) and restored, as many
documents are built as are wanted, and every arm and every later run reads the same ones.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import lzma
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from . import data
from .cli import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FOLDER", "MOST", "cache_directory", "documents", "names", "task"]

FOLDER = "ruler"  # of lm-eval's tasks
MOST = 500  # documents that lm-eval generates of each task

_ESSAY_TASKS = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
)
# What tasks read beside lm-eval's own words.
_SOURCES = {
    **dict.fromkeys(_ESSAY_TASKS, "essays"),
    "ruler_qa_squad": "squad",
    "ruler_qa_hotpot": "hotpot",
}
# Packages whose words, sentences and code become documents.
_PACKAGES = ("lm-eval", "wonderwords", "nltk")
_GENERATORS = ("prepare_niah", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils")


def cache_directory() -> Path:
    """Where documents are kept: `santa_hf/ruler` in XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "santa_hf/ruler"


def documents(
    name: str, length: int, count: int, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> list[dict[str, Any]]:
    """The first documents of a RULER task at one length, as lm-eval makes them.

    Args:
        name: lm-eval's name of the task.
        length: tokens by RULER's count, which includes the answer but neither its prefix nor a chat
            template.
        count: how many, at most 500; fewer come back where some do not fit the length.
        tokenizer: loaded from a directory or the hub, from where lm-eval loads it again.
        seed: seed of the data.

    Raises:
        CommandError: data that the task needs are missing, or nothing fits into `length`.
    """
    count = min(count, MOST)
    path = cache_directory() / f"{name}-{length}-{_key(name, length, tokenizer, seed)}.json.xz"
    with suppress(OSError, EOFError, ValueError, KeyError, lzma.LZMAError):
        kept = json.loads(lzma.decompress(path.read_bytes()))
        if kept["asked"] >= count and kept["sha256"] == _hash(kept["documents"]):
            return kept["documents"][:count]
    built = _build(name, length, count, tokenizer.name_or_path, seed)
    _keep(path, {"asked": count, "sha256": _hash(built), "documents": built})
    return built


def _key(name: str, length: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """Hash of everything the documents depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else tokenizer.name_or_path
    versions = [version(package) for package in _PACKAGES]
    return _hash([name, length, vocabulary, seed, versions, _source(name)])[:16]


def _source(name: str) -> list[str] | str | None:
    """What a task reads: hashes of the local files, "hub", or None."""
    if name not in _SOURCES:
        return None
    if data.data_directory() is None:
        return "hub"
    try:
        files = data.ruler_files(_SOURCES[name])
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    except OSError as error:
        raise CommandError(f"{name}: its data cannot be read: {error}") from error


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _keep(path: Path, values: dict[str, Any]) -> None:
    """Write a file of documents, whole or not at all; they can be built again, so a full disk is no
    error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                # A small dictionary is enough: documents repeat one another's text.
                file.write(lzma.compress(json.dumps(values).encode(), preset=1))
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def task(name: str, found: list[dict[str, Any]]) -> Any:
    """lm-eval's task of a name, with these documents."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    _generator()
    split = datasets.Dataset.from_list(found)
    config = load_yaml(_manager().task_index[name].yaml_path, resolve_func=True)
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: {"test": split}})


def names(group_or_task: str) -> list[str]:
    """The tasks of a group of RULER tasks; of a task, itself."""
    from lm_eval.tasks._yaml_loader import load_yaml

    tasks = load_yaml(_manager().task_index[group_or_task].yaml_path, resolve_func=False)["task"]
    return [tasks] if isinstance(tasks, str) else tasks


def _generator() -> Any:
    """lm-eval's module of needle tasks; others of its modules import it."""
    # It fetches nltk's data when it is imported, which most tasks never use.
    with patch("nltk.download"), redirect_stdout(io.StringIO()):
        return importlib.import_module("lm_eval.tasks.ruler.prepare_niah")


def _manager(**metadata: Any) -> Any:
    from lm_eval.tasks import TaskManager

    folder = Path(_generator().__file__).parent
    return TaskManager(include_defaults=False, include_path=folder, metadata=metadata)


def _build(name: str, length: int, count: int, tokenizer: str, seed: int) -> list[dict[str, Any]]:
    output = io.StringIO()
    try:
        with (
            redirect_stdout(output),
            redirect_stderr(output),
            data.local_data(),
            _random_state(hashlib.sha256(f"{seed}/{name}/{length}".encode()).digest()) as set_seed,
            _generating(count),
        ):
            if name in _ESSAY_TASKS:
                _generator().download_nltk_resources()
            manager = _manager(tokenizer=tokenizer, max_seq_lengths=[length])
            set_seed()  # not earlier: what is imported for the first time may draw numbers
            loaded = manager.load([name])["tasks"][name]
    except (LookupError, OSError, ValueError) as error:
        raise CommandError(f"{name} at {length} tokens cannot be built: {error}") from error
    return json.loads(json.dumps([dict(document) for document in loaded.dataset["test"]]))


@contextmanager
def _random_state(key: bytes) -> Iterator[Callable[[], None]]:
    """A function that seeds the generators RULER draws from; the global ones are restored at the end."""
    state = random.getstate(), np.random.get_state()
    words = importlib.import_module("lm_eval.tasks.ruler.cwe_utils")

    def set_seed() -> None:
        random.seed(key)
        np.random.seed(np.frombuffer(key, np.uint32))
        words.RNG.seed(key)

    try:
        yield set_seed
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


@contextmanager
def _generating(count: int) -> Iterator[None]:
    """Let RULER's generators stop after `count` documents: each loops over tqdm(range(500))."""
    _generator()  # first: it must not be imported by another module

    def first(samples: range, **kwargs: Any) -> range:
        return samples[:count]

    with ExitStack() as stack:
        for name in _GENERATORS:
            module = importlib.import_module(f"lm_eval.tasks.ruler.{name}")
            # Else lm-eval imports its task files again, without what is set here.
            module.__mtime__ = Path(module.__file__ or "").stat().st_mtime_ns  # type: ignore[attr-defined]
            stack.enter_context(patch.object(module, "tqdm", first))
        yield
